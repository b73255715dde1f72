"""How likely each task is, and the few routes that share an image: against loops over images and temperatures."""

import pytest
import torch
import torch.nn.functional as F
from test_selectors import task_data

from peft_moe_merge.selection import DiscriminantSelector, RidgeSelector, load_selector, mixture, save_selector

KINDS = {
    "discriminant": lambda **options: DiscriminantSelector(shrinkage=(0.1,), means="classes", **options),
    "ridge": lambda **options: RidgeSelector(projection=40, **options),
}


def blurred(task, seed=0):
    """Features of a task among noise: close enough to other tasks' to be in doubt."""
    features, labels = task_data(task, seed=seed)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(10 * seed + task))
    return features + 2 * features.std() * noise, labels


def fitted(kind, **options):
    selector = KINDS[kind](held_out=0.3, reject_rate=0.1, **options)
    for task in range(3):
        selector.fit(f"task {task}", [blurred(task)])
    return selector


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_one_image_at_a_time(kind, tmp_path):
    selector = fitted(kind)
    test = torch.cat([blurred(task, seed=1)[0][:20] for task in range(4)])
    got = selector.posterior(test)
    losses = {}
    for step in range(121):
        temperature = 10 ** (-3 + step / 20)
        losses[temperature] = 0.0
        for task, own in enumerate(selector.own):
            scores = selector.decision_function(own["kept"]).double()
            log_likely = (temperature * scores).log_softmax(dim=1)[:, task]
            losses[temperature] -= log_likely.mean().item()
    best = min(losses, key=losses.get)
    assert selector.temperature == pytest.approx(best)
    doubtful = 0
    for features, likely in zip(test, got, strict=True):
        scores, bars = selector.judge(features[None])
        top = scores[0].argmax()
        none = 0.2 if scores[0, top] >= bars[0, top] else 1.0
        tasks = (1 - none) * F.softmax(best * scores[0].double(), dim=0)
        torch.testing.assert_close(likely, torch.tensor([*tasks.tolist(), none]), rtol=1e-4, atol=1e-5)
        doubtful += 0.05 < tasks.max() < 0.75
    assert doubtful > 5
    assert (got[:, -1] == 1).any() and (got[:, -1] < 0.21).any()
    save_selector(selector, tmp_path)
    assert torch.equal(load_selector(tmp_path).posterior(test), got)


def test_what_is_known_of_the_task():
    selector = fitted("discriminant")
    test = torch.cat([blurred(task, seed=1)[0][:20] for task in range(4)])
    sure = selector.posterior(test, may_be_none=False)
    assert (sure[:, -1] == 0).all()
    torch.testing.assert_close(sure.sum(dim=1), torch.ones(80))
    two = selector.posterior(test, allowed=(0, 2), may_be_none=False)
    torch.testing.assert_close(two[:, [0, 2]], sure[:, [0, 2]] / sure[:, [0, 2]].sum(dim=1, keepdim=True))
    assert (two[:, 1] == 0).all()
    threshold = selector.posterior(test, unknown=0)[:, -1]
    assert torch.equal(threshold == 1, selector.predict(test) == -1) and set(threshold.tolist()) == {0.0, 1.0}
    for unknown in (-0.1, 1.0):
        with pytest.raises(ValueError, match="`unknown` must lie in"):
            selector.posterior(test, unknown=unknown)
    with pytest.raises(ValueError, match="`allowed` must be ids of the 3 tasks"):
        selector.posterior(test, allowed=())
    with pytest.raises(RuntimeError, match="knows no task yet"):
        DiscriminantSelector().posterior(test)


def test_without_images_to_calibrate_with():
    selector = DiscriminantSelector(held_out=1e-9, reject_rate=0, shrinkage=(0.1,), shared=(1.0,))
    for task in range(2):
        selector.fit(f"task {task}", task_data(task)[0])
    features = task_data(0, seed=1)[0][:4]
    expected = 0.8 * selector.decision_function(features).softmax(dim=1)
    torch.testing.assert_close(selector.posterior(features)[:, :2], expected)
    assert selector.temperature == 1.0


@pytest.mark.parametrize("mass, most", [(0.95, 3), (0.5, 3), (1.0, 2), (0.95, 1), (1.0, 9)])
def test_mixture_against_a_loop(mass, most):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = (2 * logits).softmax(dim=1)
    posterior[0] = torch.tensor([0.25, 0.25, 0.5, 0, 0, 0])  # equal ones: the first goes first
    for of_image, shares in zip(posterior, mixture(posterior, mass, most), strict=True):
        kept = {}
        for route in sorted(range(6), key=lambda route: -of_image[route]):
            if sum(kept.values()) < mass and len(kept) < most:
                kept[route] = of_image[route].item()
        expected = [kept.get(route, 0.0) / sum(kept.values()) for route in range(6)]
        torch.testing.assert_close(shares, torch.tensor(expected).double())


@pytest.mark.parametrize("wrong", [{"mass": 0}, {"mass": 1.1}, {"most": 0}])
def test_bad_mixtures(wrong):
    with pytest.raises(ValueError, match="`mass` must lie in"):
        mixture(torch.full((2, 2), 0.5), **wrong)
