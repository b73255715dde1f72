"""Selectors made of sums: the order of images, tasks and batches does not matter, and the results are scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.linear_model import Ridge
from test_selectors import CLASSES, WIDTH, make, task_data

from peft_moe_merge.selection import DiscriminantSelector, RidgeSelector

VARIANTS = {
    "ridge": lambda **options: make("ridge", **options),
    "ridge on classes": lambda **options: make("ridge", labels="classes", none_by="score", **options),
    "discriminant": lambda **options: DiscriminantSelector(**options),
    "class means": lambda **options: DiscriminantSelector(means="classes", thresholds_by="all", **options),
    "linear": lambda **options: DiscriminantSelector(shared=(1.0,), means="classes", **options),
}
ALL = {"held_out": 1e-9, "reject_rate": 0}  # nothing held out


def state(selector):
    """Everything that is kept, by task and name."""
    of_tasks = {
        f"{task} {name}": t for task, own in zip(selector.tasks, selector.own, strict=True) for name, t in own.items()
    }
    return of_tasks | selector.shared


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_order_gives_the_same(variant):
    """All at once against single images of all tasks in random order: the same to 1e-8, thresholds and choices too."""
    whole, pieces = VARIANTS[variant](calibration=9), VARIANTS[variant](calibration=9)
    rows = []
    for task in range(3):
        features, labels = task_data(task)
        whole.fit(f"task {task}", [(features, labels)])
        rows += [(task, features[i : i + 3], labels[i : i + 3]) for i in range(0, len(features), 3)]
    for row in torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist():
        task, features, labels = rows[row]
        pieces.partial_fit(f"task {task}", features, labels)
    assert sorted(pieces.tasks) == whole.tasks and pieces.tasks != whole.tasks, "another order of tasks"
    test = torch.cat([task_data(task, seed=1)[0] for task in range(4)])
    columns = [pieces.tasks.index(task) for task in whole.tasks]
    for ours, other in zip(whole.judge(test), pieces.judge(test), strict=True):
        torch.testing.assert_close(other[:, columns], ours, rtol=1e-4, atol=1e-4)  # computed in float32
    expected, got = state(whole), state(pieces)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-8, atol=1e-8 if "threshold" not in name else 1e-4)
    assert all(len(own["kept"]) == 9 and own["images"] == 141 for own in whole.own), "those not kept are in the sums"


@pytest.mark.parametrize("labels", ["tasks", "classes"])
def test_ridge_is_scikit_learns(labels):
    selector = RidgeSelector(projection=40, labels=labels, ridges=(0.02,), **ALL)
    features, targets = [], []
    for task in range(3):
        x, y = task_data(task)
        selector.fit(f"task {task}", [(x, y)])
        features.append(x.double())
        targets.append(y + CLASSES * task if labels == "classes" else torch.full_like(y, task))
    projected = selector.project(torch.cat(features))
    assert (projected >= 0).all() and projected.shape == (450, 40) and (projected == 0).any(dim=0).all()
    alpha = 0.02 * (projected**2).sum().item() / 40
    onehot = torch.nn.functional.one_hot(torch.cat(targets)).double()
    reference = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(projected.numpy(), onehot.numpy())
    weights, ridge = selector.solve()
    assert ridge == pytest.approx(alpha)
    np.testing.assert_allclose(weights.T, reference.coef_, rtol=1e-8, atol=1e-10)
    test = task_data(1, seed=1)[0]
    outputs = torch.from_numpy(reference.predict(selector.project(test.double()).numpy()))
    if labels == "classes":
        outputs = torch.stack([part.amax(dim=1) for part in outputs.split(CLASSES, dim=1)], dim=1)
    torch.testing.assert_close(selector.decision_function(test).double(), outputs, rtol=1e-4, atol=1e-4)


def test_ridge_takes_the_least_error_on_the_images_kept():
    """Few noisy images and many random features: the middle of the grid is best; and each choice by its own error."""
    selector = RidgeSelector(projection=200, ridges=(1e-6, 1e-2, 1e3), held_out=0.4, calibration=50)
    for task in range(3):
        selector.fit(f"task {task}", task_data(task)[0])
    kept = [own["kept"].double() for own in selector.own]
    onehot = torch.eye(3, dtype=torch.float64).repeat_interleave(torch.tensor([len(part) for part in kept]), dim=0)
    gram, sums = selector.shared["gram"], torch.cat([own["sums"] for own in selector.own]).T
    errors = {}
    for ridge in selector.ridges:
        weights = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(200), sums)
        errors[ridge] = ((selector.project(torch.cat(kept)) @ weights - onehot) ** 2).sum()
    assert min(errors, key=errors.get) == 1e-2
    weights, ridge = selector.solve()
    assert ridge == pytest.approx(1e-2 * gram.diagonal().mean().item())


def test_ridge_leverage_is_large_where_nothing_was():
    selector = RidgeSelector(projection=50, ridges=(0.01,), reject_rate=0.05, held_out=0.3)
    for task in range(2):
        selector.fit(f"task {task}", task_data(task, images=600)[0])
    gram = selector.shared["gram"]
    regular = gram + 0.01 * gram.diagonal().mean() * torch.eye(50)
    test = task_data(5, seed=1)[0]
    hidden = selector.project(test.double())
    leverage = (hidden * torch.linalg.solve(regular, hidden.T).T).sum(dim=1)
    scores, bars = selector.judge(test)
    kept = selector.project(selector.own[0]["kept"].double())
    own = (kept * torch.linalg.solve(regular, kept.T).T).sum(dim=1)
    level = own.quantile(0.95, interpolation="higher")
    torch.testing.assert_close((scores - bars)[:, 0].double(), level - leverage, rtol=1e-3, atol=1e-4)
    assert (selector.predict(test) == -1).float().mean() > 0.9
    assert (selector.predict(task_data(0, seed=1)[0]) == -1).float().mean() < 0.15


def log_odds(probabilities):
    return np.log(probabilities) - np.log(probabilities[:, :1])


def test_quadratic_is_scikit_learns():
    selector = DiscriminantSelector(shared=(0.0,), shrinkage=(0.0,), **ALL)
    for task in range(3):
        selector.fit(f"task {task}", task_data(task)[0])
    x = torch.cat([task_data(task)[0] for task in range(3)]).double().numpy()
    reference = QuadraticDiscriminantAnalysis(solver="eigen", priors=[1 / 3] * 3).fit(x, np.repeat([0, 1, 2], 150))
    test = torch.cat([task_data(task, seed=1, images=30)[0] for task in range(4)])
    ours = selector.decision_function(test).double()
    expected = reference.decision_function(test.double().numpy())
    np.testing.assert_allclose(ours - ours[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-3)
    assert selector.predict(test).tolist() == reference.predict(test.double().numpy()).tolist()


def test_linear_is_scikit_learns():
    selector = DiscriminantSelector(shared=(1.0,), shrinkage=(0.0,), **ALL)
    for task in range(3):
        selector.fit(f"task {task}", task_data(task)[0])
    x = torch.cat([task_data(task)[0] for task in range(3)]).double().numpy()
    reference = LinearDiscriminantAnalysis(solver="lsqr").fit(x, np.repeat([0, 1, 2], 150))
    test = torch.cat([task_data(task, seed=1, images=30)[0] for task in range(4)])
    ours = selector.decision_function(test).double()
    expected = reference.decision_function(test.double().numpy())
    np.testing.assert_allclose(ours - ours[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-3)
    assert "scatter" not in selector.own[0] and selector.shared["scatter"].shape == (WIDTH, WIDTH)


@pytest.mark.parametrize("share, intensity", [(0.4, 0.3), (1.0, 0.1), (0.0, 0.6)])
def test_between_linear_and_quadratic(share, intensity):
    """Two passes over everything, and scipy's densities."""
    selector = DiscriminantSelector(means="classes", shared=(share,), shrinkage=(intensity,), **ALL)
    scatters, means, counts = [], [], []
    for task in range(3):
        x, labels = task_data(task)
        selector.fit(f"task {task}", [(x, labels)])
        x = x.double()
        means.append([x[labels == label].mean(dim=0) for label in range(CLASSES)])
        deviations = x - torch.stack(means[-1])[labels]
        scatters.append(deviations.T @ deviations)
        counts.append(len(x))
    test = torch.cat([task_data(task, seed=1, images=5)[0] for task in range(3)])
    expected = []
    for scatter, of_task, count in zip(scatters, means, counts, strict=True):
        covariance = (1 - share) * scatter / count + share * sum(scatters) / sum(counts)
        covariance = (1 - intensity) * covariance + intensity * torch.diag(covariance.diagonal())
        densities = [multivariate_normal(mean, covariance).pdf(test.double()) for mean in of_task]
        expected.append(np.log(np.mean(densities, axis=0)) + WIDTH / 2 * np.log(2 * np.pi))
    np.testing.assert_allclose(selector.decision_function(test), np.stack(expected, axis=1), rtol=1e-3, atol=2e-2)


def test_what_is_chosen_fits_the_images_kept_best():
    """Tasks that differ by their covariance alone ask for their own; tasks alike but few, for a common one."""
    generator = torch.Generator().manual_seed(0)
    turned = DiscriminantSelector(shared=(0.0, 1.0), shrinkage=(0.0, 0.01), held_out=0.3)
    for task in range(2):
        noise = torch.randn(600, 2, generator=generator) * torch.tensor([1.0, 4.0] if task else [4.0, 1.0])
        turned.fit(f"task {task}", noise)
    assert turned.choose()[0] == 0.0
    few = DiscriminantSelector(shared=(0.0, 1.0), shrinkage=(0.01,), held_out=0.5)
    for task in range(3):
        few.fit(f"task {task}", task_data(task, images=40)[0])
    assert few.choose()[0] == 1.0
    _, _, temperature = turned.choose()
    kept = torch.cat([own["kept"] for own in turned.own])
    tasks = torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(own["kept"]) for own in turned.own]))
    best = torch.nn.functional.cross_entropy(temperature * turned.decision_function(kept), tasks).item()
    for other in ((0.0, 0.0), (0.0, 0.01), (1.0, 0.01)):
        fixed = DiscriminantSelector(shared=other[:1], shrinkage=other[1:], held_out=0.3)
        for position, task in enumerate(turned.tasks):
            fixed.tasks.append(task)
            fixed.own.append({**turned.own[position]})
        fixed.width = 2
        if other[0] == 1.0:
            fixed.shared = {"scatter": sum(own["scatter"] for own in turned.own)}
        for scale in (0.01, 0.1, 1.0, temperature):
            loss = torch.nn.functional.cross_entropy(scale * fixed.decision_function(kept), tasks).item()
            assert loss >= best - 1e-4


@pytest.mark.parametrize("thresholds_by", ["task", "all"])
def test_discriminants_reject_the_unknown(thresholds_by):
    """Task 2 scatters three times as far: by one threshold for all it is rejected more often, the others less."""
    selector = DiscriminantSelector(
        shared=(1.0,), thresholds_by=thresholds_by, reject_rate=0.1, held_out=0.3, calibration=400
    )

    def images(task, seed=0):
        x = task_data(task, images=2000, seed=seed)[0]
        return x if task != 2 else x.mean(dim=0) + 3 * (x - x.mean(dim=0))

    for task in range(3):
        selector.fit(f"task {task}", images(task))
    rejected = [(selector.predict(images(task, seed=1)) == -1).float().mean().item() for task in range(3)]
    if thresholds_by == "task":
        assert rejected == pytest.approx([0.1] * 3, abs=0.08)
    else:
        assert sum(rejected) / 3 == pytest.approx(0.1, abs=0.04) and rejected[2] > 0.2 and max(rejected[:2]) < 0.05
    assert len(set(selector.thresholds().tolist())) == (3 if thresholds_by == "task" else 1)


def test_a_duplicate_is_held_out_with_its_twin():
    """An image's place depends on the image alone, so the images kept tell about images that the sums have not seen."""
    x = task_data(0)[0]
    selector = DiscriminantSelector(held_out=0.3)
    selector.fit("a", torch.cat([x, x]))
    kept = selector.own[0]["kept"]
    assert len(kept) % 2 == 0 and len(kept.unique(dim=0)) == len(kept) // 2 and 60 < len(kept) < 120
    other = DiscriminantSelector(held_out=0.3, seed=1)
    other.fit("a", torch.cat([x, x]))
    assert not torch.equal(other.own[0]["kept"], kept)


def test_bad_input():
    for options, message in (
        ({"calibration": 0}, "`calibration`"),
        ({"means": "images"}, "`means` must be"),
        ({"thresholds_by": "chance"}, "`thresholds_by` must be"),
        ({"shared": (1.5,)}, "`shared` must be shares"),
        ({"shrinkage": ()}, "`shrinkage` must be shares"),
    ):
        with pytest.raises(ValueError, match=message):
            DiscriminantSelector(**options)
    for options, message in (
        ({"projection": 0}, "`projection`"),
        ({"labels": "names"}, "`labels` must be"),
        ({"ridges": (0.0,)}, "`ridges` must be positive"),
        ({"none_by": "chance"}, "`none_by` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            RidgeSelector(**options)
    x, labels = task_data(0)
    for selector in (RidgeSelector(projection=8, labels="classes"), DiscriminantSelector(means="classes")):
        with pytest.raises(ValueError, match="needs labels"):
            selector.partial_fit("a", x)
        with pytest.raises(ValueError, match=r"150 images of task 'a' with labels of shape \(3,\)"):
            selector.partial_fit("a", x, labels[:3])
        assert not selector.tasks and selector.width is None
        selector.partial_fit("a", x, labels)
        nan = x.clone()
        nan[2, 3] = float("nan")
        before = state(selector)
        with pytest.raises(ValueError, match="NaN or infinite for 1 of 150 images"):
            selector.partial_fit("a", nan, labels)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state(selector).items())


@pytest.mark.parametrize("means", ["tasks", "classes"])
def test_one_covariance_for_all_against_a_loop_over_densities(means):
    """Tasks have 2, 3 and 1 classes; images are whitened once for all of them."""
    generator = torch.Generator().manual_seed(0)
    selector = DiscriminantSelector(means=means, shared=(1.0,), shrinkage=(0.1,), reject_rate=0, held_out=0.01)
    for task, classes in enumerate((2, 3, 1)):
        labels = torch.arange(60) % classes
        centres = 3 * torch.randn(classes, 5, generator=generator)
        selector.fit(f"task {task}", [(centres[labels] + torch.randn(60, 5, generator=generator), labels)])
    images = torch.stack([own["counts"].sum() for own in selector.own]).sum()
    covariance = selector.shared["scatter"] / images
    covariance = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal())
    x = torch.randn(7, 5, generator=generator)
    expected = []
    for own in selector.own:
        mixed = [
            torch.distributions.MultivariateNormal(mean, covariance).log_prob(x.double())
            for mean, count in zip(own["means"], own["counts"], strict=True)
            if count
        ]
        expected.append(torch.stack(mixed).logsumexp(dim=0) - math.log(len(mixed)) + 2.5 * math.log(2 * math.pi))
    torch.testing.assert_close(
        selector.decision_function(x), torch.stack(expected, dim=1).float(), rtol=1e-4, atol=1e-4
    )
