"""What CLIP says of classes and what their Gaussians say, as one."""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from peft_moe_merge.selection import DiscriminantSelector, fuse, load_selector, save_selector

WIDTH, CLASSES = 6, 4


def images(task, count=400, seed=0):
    generator = torch.Generator().manual_seed(100 * task + seed)
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(task))
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return means[labels] + torch.randn(count, WIDTH, generator=generator), labels


def fitted(tasks=2, **options):
    selector = DiscriminantSelector(means="classes", **options)
    for task in range(tasks):
        selector.fit(f"task {task}", [images(task)])
    return selector


def densities(selector, task, x, share, intensity):
    """Logarithms by scipy, of the classes of a task, from the selector's own sums."""
    within = selector.shared["scatter"] if share == 1 else sum(own["scatter"] for own in selector.own)
    covariance = share * within / sum(own["counts"].sum() for own in selector.own)
    own = selector.own[task]
    if share < 1:
        covariance = covariance + (1 - share) * own["scatter"] / own["counts"].sum()
    covariance = (1 - intensity) * covariance + intensity * torch.diag(covariance.diagonal())
    of_class = [multivariate_normal(mean, covariance).logpdf(x.double()) for mean in own["means"]]
    return torch.from_numpy(np.stack(of_class, axis=1))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_class_posterior_against_densities_at_the_temperature_that_fits_best(share):
    selector = fitted(shared=(share,), shrinkage=(0.1,))
    x, _ = images(1, 20, seed=7)
    labels, ours = selector.class_posterior(x, 1)
    assert labels.tolist() == list(range(CLASSES))
    losses = []
    for temperature in np.logspace(-3, 3, 121):
        loss = 0.0
        for task, own in enumerate(selector.own):
            scores = temperature * densities(selector, task, own["kept"], share, 0.1)
            right = scores.log_softmax(dim=1)[torch.arange(len(scores)), own["kept_labels"]]
            loss -= right.mean().item()
        losses.append(loss)
    best = np.logspace(-3, 3, 121)[np.argmin(losses)]
    assert selector.class_temperature == pytest.approx(best)
    expected = (best * densities(selector, 1, x, share, 0.1)).log_softmax(dim=1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-3, atol=2e-3)


def test_one_covariance_for_all_is_the_same_as_separate_ones_that_are_alike():
    linear, separate = fitted(3, shared=(1.0,)), fitted(3, shared=(1.0, 1.0 - 1e-12))
    x, labels = images(2, 300, seed=5)
    assert linear.linear and not separate.linear
    for one, other in zip(linear.class_posterior(x, 2), separate.class_posterior(x, 2), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert (linear.class_posterior(x, 2)[1].argmax(dim=1) == labels).float().mean() > 0.8


def test_a_class_without_images_has_no_posterior(tmp_path):
    selector = DiscriminantSelector(means="classes", shared=(1.0,))
    x, labels = images(0)
    some = labels != 1
    selector.fit("without one", [(x[some], labels[some])])
    selector.fit("whole", [images(1)])
    columns, posterior = selector.class_posterior(x[:5], 0)
    assert columns.tolist() == [0, 2, 3] and posterior.shape == (5, 3)
    save_selector(selector, tmp_path)
    for one, other in zip(load_selector(tmp_path).class_posterior(x[:5], 0), (columns, posterior), strict=True):
        assert torch.equal(one, other)


def test_a_class_whose_images_are_all_held_out_is_left_out_of_the_calibration():
    selector = DiscriminantSelector(means="classes", shared=(1.0,), held_out=0.5, calibration=1000)
    x, labels = images(0)
    held = selector._draws(x) < 0.5  # which images, the selector alone knows
    keep = (labels != CLASSES - 1) | held
    selector.fit("one class held out", [(x[keep], labels[keep])])
    columns, posterior = selector.class_posterior(x[:5], 0)
    assert columns.tolist() == list(range(CLASSES - 1)) and posterior.isfinite().all()


def test_one_image_a_class_has_no_say():
    """Nothing tells how sure to be: CLIP's probabilities stay, and alone the nearest mean still comes first."""
    selector = DiscriminantSelector(means="classes", shared=(1.0,), held_out=1e-9)
    x = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    selector.fit("any", [(x, torch.arange(CLASSES))])
    logits = torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(1))
    columns, posterior = selector.class_posterior(x + 0.1, 0)
    assert posterior.argmax(dim=1).tolist() == list(range(CLASSES))
    torch.testing.assert_close(fuse(logits, columns, posterior), logits.log_softmax(dim=1), rtol=1e-3, atol=1e-3)


def test_under_autocast_it_says_the_same():
    """Calibration included, which the first call does."""
    plain, cast = fitted(3), fitted(3)
    x, _ = images(1, 50, seed=5)
    expected = plain.posterior(x), *plain.class_posterior(x, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = cast.posterior(x), *cast.class_posterior(x, 1)
    assert (cast.temperature, cast.class_temperature) == (plain.temperature, plain.class_temperature)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_fused_is_the_product_of_two_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits, evidence = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    evidence = evidence.log_softmax(dim=1)
    product = logits.softmax(dim=1) * evidence.exp()
    fused = fuse(logits, torch.arange(5), evidence).exp()
    torch.testing.assert_close(fused, product / product.sum(dim=1, keepdim=True))
    nothing_known = torch.full((7, 5), -math.log(5), dtype=torch.float64)
    torch.testing.assert_close(fuse(logits, torch.arange(5), nothing_known), logits.log_softmax(dim=1))


def test_classes_that_nothing_is_known_of_keep_what_clip_gives_them():
    logits = torch.tensor([[1.0, 2.0, 0.5, -torch.inf], [-torch.inf, 0.0, -torch.inf, 1.0]])
    columns = torch.tensor([2, 0])
    evidence = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
    clip = logits.softmax(dim=1)
    fused = fuse(logits, columns, evidence).exp()
    shared = clip[0, 2] * 0.9 + clip[0, 0] * 0.1
    mass = clip[0, 2] + clip[0, 0]
    expected = [clip[0, 0] * 0.1 / shared * mass, clip[0, 1], clip[0, 2] * 0.9 / shared * mass, 0.0]
    torch.testing.assert_close(fused[0], torch.stack([torch.as_tensor(value) for value in expected]))
    torch.testing.assert_close(fused[1], clip[1])  # both known ones are ruled out


def test_no_thread_finds_a_selector_that_is_half_ready(tmp_path, monkeypatch):
    """The first call calibrates; those of other threads that come meanwhile wait for it."""
    save_selector(fitted(shared=(1.0,)), tmp_path)
    x, _ = images(0, 20, seed=3)

    def asked(selector):
        return selector.posterior(x), selector.class_posterior(x, 0)[1], selector.judge(x)[1]

    expected = asked(load_selector(tmp_path))
    calibrate = DiscriminantSelector._calibrate

    def slowly(selector, device):
        time.sleep(0.2)
        calibrate(selector, device)

    monkeypatch.setattr(DiscriminantSelector, "_calibrate", slowly)
    selector = load_selector(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: asked(selector), range(8)):
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert copy.deepcopy(selector).tasks == selector.tasks


def test_errors_name_the_way_out():
    selector = DiscriminantSelector(means="tasks")
    selector.fit("any", images(0)[0])
    with pytest.raises(ValueError, match=r"DiscriminantSelector\.for_classes\(model\)"):
        selector.class_posterior(images(0)[0], 0)
    with pytest.raises(RuntimeError, match="fit"):
        DiscriminantSelector(means="classes").class_posterior(images(0)[0], 0)
    with pytest.raises(ValueError, match="width"):
        fitted().class_posterior(torch.zeros(2, WIDTH + 1), 0)
