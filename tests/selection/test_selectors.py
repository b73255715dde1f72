"""Selectors on features: against two-pass formulas and loops written here, and what they refuse."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.covariance import oas
from torch import nn

from peft_moe_merge.selection import (
    NONE,
    SELECTORS,
    AutoencoderSelector,
    GaussianSelector,
    ImageFeatures,
    PatchTokens,
    PrototypeSelector,
    TextSelector,
    decide,
    load_selector,
    save_selector,
)
from peft_moe_merge.selection.moments import Moments, shrink

WIDTH, CLASSES = 12, 3


def task_data(task, images=150, seed=0):
    """Correlated features of one task's classes, and labels; classes differ less than tasks."""
    generator = torch.Generator().manual_seed(100 * task + seed)
    shape = torch.Generator().manual_seed(7)
    mixing = torch.randn(WIDTH, WIDTH, generator=shape) * 0.5
    centres = torch.randn(9, WIDTH, generator=shape) * 3
    offsets = torch.randn(9, CLASSES, WIDTH, generator=shape)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    noise = torch.randn(images, WIDTH, generator=generator) @ mixing
    return centres[task] + offsets[task, labels] + noise, labels


def texts(task):
    return torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(task))


def make(kind, **options):
    if kind == "autoencoder":
        options = {"iterations": 40, "bottleneck": 4, **options}
    if kind == "ridge":
        options = {"projection": 64, **options}
    return SELECTORS[kind](**options)


def fitted(selector, tasks=3, **data):
    for task in range(tasks):
        selector.fit(f"task {task}", [task_data(task, **data)], texts(task))
    return selector


KINDS = list(SELECTORS)


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("splits", [[400], [1] * 40 + [360], [399, 1], [7, 130, 263]])
def test_streaming_moments_are_the_two_pass_ones(splits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, WIDTH, generator=generator, dtype=torch.float64) + 1e6  # where a naive sum of squares fails
    labels = torch.randint(0, CLASSES, (400,), generator=generator)
    moments = Moments(WIDTH)
    for part, label in zip(x.split(splits), labels.split(splits), strict=True):
        moments.update(part, label)
    expected = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for component in range(CLASSES):
        rows = x[labels == component]
        assert moments.counts_C[component] == len(rows)
        torch.testing.assert_close(moments.means_CF[component], rows.mean(dim=0), rtol=1e-14, atol=0)
        expected += (rows - rows.mean(dim=0)).T @ (rows - rows.mean(dim=0))
    torch.testing.assert_close(moments.scatter_FF / 400, expected / 400, rtol=1e-8, atol=1e-8)


def test_shrinkage_is_scikit_learns_on_standardized_features():
    x = task_data(0, images=30)[0].double()
    x = x - x.mean(dim=0)
    covariance = x.T @ x / len(x)
    deviations = covariance.diagonal().sqrt()
    correlation, intensity = oas((x / deviations).numpy(), assume_centered=True)
    ours, ours_intensity = shrink(covariance, len(x))
    assert ours_intensity == pytest.approx(intensity) and 0.01 < intensity < 0.9
    expected = torch.from_numpy(correlation) * torch.outer(deviations, deviations)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(shrink(torch.zeros(4, 4), 1)[0] > 0, torch.eye(4, dtype=torch.bool)), "it can be inverted"


@pytest.mark.parametrize("per_class", [False, True])
def test_gaussian_scores_are_log_likelihoods(per_class):
    """With everything kept, unlike in the selector: all tasks' data in two passes, and one image at a time."""
    selector = fitted(GaussianSelector(per_class=per_class, held_out=1e-9))
    groups, scatter, images = [], torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0
    for task in range(3):
        x, labels = task_data(task)
        labels = labels if per_class else torch.zeros_like(labels)
        means = [x[labels == label].double().mean(dim=0) for label in labels.unique()]
        groups.append(means)
        for label, mean in enumerate(means):
            rows = x[labels == label].double() - mean
            scatter += rows.T @ rows
        images += len(x)
    covariance, _ = shrink(scatter / images, images)
    test = torch.cat([task_data(task, images=4, seed=1)[0] for task in range(4)])
    scores = selector.select(test)[1]
    for image, row in zip(test.double(), scores, strict=True):
        for means, score in zip(groups, row, strict=True):
            distances = [(image - mean) @ torch.linalg.solve(covariance, image - mean) for mean in means]
            expected = (
                math.log(sum(math.exp(-d / 2) for d in distances) / len(means)) if min(distances) < 1000 else None
            )
            if expected is not None:
                assert score.item() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert (scores.max(dim=1).values > -40)[:12].all(), "the tasks' own images are compared"


@pytest.mark.parametrize("kind", KINDS)
def test_the_batches_do_not_matter(kind):
    whole, parts = make(kind), make(kind)
    for task in range(2):
        x, labels = task_data(task)
        whole.fit(str(task), [(x, labels)], texts(task))
        parts.fit(str(task), zip(x.split([1, 16, 100, 33]), labels.split([1, 16, 100, 33]), strict=True), texts(task))
    test = task_data(1, seed=1)[0]
    for ours, other in zip(whole.judge(test), parts.judge(test), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_judged_alone(kind):
    selector = fitted(make(kind))
    test = torch.cat([task_data(task, seed=1, images=20)[0] for task in range(4)])
    ids, scores = selector.select(test)
    assert ids.dtype == torch.int64 and ids.shape == (80,) and scores.shape == (80, 3)
    shuffled = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    assert torch.equal(selector.select(test[shuffled])[0], ids[shuffled])
    one_by_one = torch.cat([selector.select(image[None])[0] for image in test])
    assert torch.equal(one_by_one, ids)


@pytest.mark.parametrize("kind", ["gaussian", "discriminant", "ridge", "prototypes", "autoencoder"])
def test_they_tell_tasks_apart(kind):
    selector = fitted(make(kind, iterations=300) if kind == "autoencoder" else make(kind))
    chosen = [selector.select(task_data(task, seed=1)[0])[0] for task in range(3)]
    right = sum((ids == task).float().mean().item() for task, ids in enumerate(chosen)) / 3
    assert right > (0.85 if kind != "autoencoder" else 0.5), right


def test_gaussian_rejects_what_it_was_told_to():
    selector = fitted(GaussianSelector(reject_rate=0.2, held_out=0.3), images=2000)
    for task in range(3):  # the covariance changed after the first two; their thresholds moved along
        ids = selector.select(task_data(task, seed=1, images=2000)[0])[0]
        assert (ids == NONE).float().mean().item() == pytest.approx(0.2, abs=0.05)
    unknown = selector.select(task_data(5, images=2000)[0])[0]
    assert (unknown == NONE).float().mean() > 0.9
    never = fitted(GaussianSelector(reject_rate=0))
    assert (never.select(task_data(5)[0])[0] != NONE).all()


def test_thresholds_move_with_the_covariance():
    """A later task whose images scatter far more makes all old distances small; so the old thresholds shrink."""
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2000, 4, generator=generator), 40 + 10 * torch.randn(2000, 4, generator=generator)
    selector = GaussianSelector(reject_rate=0.1, held_out=0.3)
    selector.fit("old", old)
    before = selector.thresholds()[0].item()
    selector.fit("new", new)
    assert selector.thresholds()[0].item() / before == pytest.approx(2 / 101, rel=0.1)  # (1 + 1) / (1 + 100)
    test = torch.randn(2000, 4, generator=generator)
    scores, bars = selector.judge(test)
    assert (scores[:, 0] < bars[:, 0]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_prototypes_against_a_loop():
    selector = fitted(PrototypeSelector(held_out=1e-9), tasks=2)
    test = task_data(0, seed=1, images=10)[0]
    scores = selector.decision_function(test)
    for image, row in zip(test, scores, strict=True):
        for task, score in enumerate(row):
            x, labels = task_data(task)
            means = [nn.functional.normalize(x[labels == label], dim=1).mean(dim=0) for label in range(CLASSES)]
            expected = max(nn.functional.cosine_similarity(image, mean, dim=0).item() for mean in means)
            assert score.item() == pytest.approx(expected, abs=1e-5)


def test_texts_against_a_loop():
    selector = fitted(TextSelector(), tasks=2)
    test = task_data(0, seed=1, images=10)[0]
    for image, row in zip(test, selector.decision_function(test), strict=True):
        for task, score in enumerate(row):
            expected = max(nn.functional.cosine_similarity(image, text, dim=0).item() for text in texts(task))
            assert score.item() == pytest.approx(expected, abs=1e-5)


def test_autoencoder_is_the_published_one():
    selector = AutoencoderSelector(bottleneck=5, iterations=60, held_out=0.2)
    selector.fit("a", task_data(0)[0])
    own, test = selector.own[0], task_data(0, seed=1)[0]
    target = test.sigmoid()
    hidden = torch.relu(target @ own["down_weight"].T + own["down_bias"])
    output = torch.sigmoid(hidden @ own["up_weight"].T + own["up_bias"])
    error = ((output - target) ** 2).mean(dim=1)
    torch.testing.assert_close(selector.decision_function(test)[:, 0], -error, rtol=1e-5, atol=1e-7)
    assert own["down_weight"].shape == (5, WIDTH) and selector.bytes_per_task == 4 * (2 * 5 * WIDTH + 5 + WIDTH) + 24
    longer = AutoencoderSelector(bottleneck=5, iterations=600, held_out=0.2)
    longer.fit("a", task_data(0)[0])
    assert longer.decision_function(test).mean() > selector.decision_function(test).mean(), "training lowers the error"


def test_autoencoder_threshold_and_reference():
    test = torch.cat([task_data(0, seed=1)[0], task_data(4, seed=1)[0]])
    selector = AutoencoderSelector(threshold=0.06, iterations=300, bottleneck=8)
    selector.fit("a", task_data(0)[0])
    ids, scores = selector.select(test)
    assert torch.equal(ids == NONE, scores[:, 0] < torch.tensor(-0.06)) and 0 < (ids == NONE).sum() < len(test)
    selector = AutoencoderSelector(reject_rate=0, iterations=300, reference_iterations=300, bottleneck=8)
    selector.fit("a", task_data(0)[0])
    assert (selector.select(test)[0] == 0).all(), "nothing else to choose"
    selector.fit_reference(task_data(4)[0])
    ids = selector.select(test)[0]
    assert (ids[:150] == 0).float().mean() > 0.7 and (ids[150:] == NONE).float().mean() > 0.7


@pytest.mark.parametrize("kind", ["gaussian", "discriminant", "ridge"])
def test_thresholds_of_batches_reject_what_they_should(kind):
    """A share of single images, `reject_rate`; of a task's own batches few, of another's all, though means scatter less."""
    selectors = [fitted(make(kind, reject_rate=0.1, held_out=0.3, seed=seed), images=3000) for seed in range(5)]
    for size in (1, 4, 64):
        rejected = []
        for selector in selectors:
            for task in range(3):
                scores, bars = selector.judge(task_data(task, seed=1, images=3200)[0], together=size)
                means = [values[:, task].reshape(-1, size).mean(dim=1) for values in (scores, bars)]
                rejected.append((means[0] < means[1]).float().mean())
        assert torch.stack(rejected).mean().item() == pytest.approx(0.1, abs=0.06), size
    scores, bars = selector.judge(task_data(5, images=640)[0], together=64)
    for group in zip(scores.split(64), bars.split(64), strict=True):
        assert (decide(*group, per_batch=True)[0] == NONE).all()
    one, many = selector.thresholds(1), selector.thresholds(64)
    assert (many > one).all()
    middle = selector.thresholds(4)
    held_out = 128 if kind != "gaussian" else 900  # about
    share = lambda together: ((1 / together + 1 / held_out) / (1 + 1 / held_out)) ** 0.5  # noqa: E731
    torch.testing.assert_close(
        (middle - one) / (many - one), torch.full_like(one, (1 - share(4)) / (1 - share(64))), rtol=2e-3, atol=0
    )


def test_among_allowed_tasks():
    scores = torch.tensor([[5.0, 1.0, 2.0], [2.0, 3.0, 4.0]])
    bars = torch.tensor([6.0, 0.5, 3.0]).expand(2, 3)
    assert decide(scores, bars)[0].tolist() == [NONE, 2]
    assert decide(scores, bars, allowed=[2, 1])[0].tolist() == [NONE, 2]
    assert decide(scores, bars, allowed=[1])[0].tolist() == [1, 1]
    selector = fitted(make("discriminant"))
    x = torch.cat([task_data(task, seed=1)[0] for task in range(3)])
    ids, scores = selector.select(x, allowed=[0, 2])
    assert set(ids.tolist()) <= {NONE, 0, 2}
    chosen = ids != NONE
    assert torch.equal(ids[chosen], torch.where(scores[:, 2] > scores[:, 0], 2, 0)[chosen])


def test_per_batch_is_the_decision_of_the_mean():
    scores = torch.tensor([[5.0, 1.0], [2.0, 3.0], [2.0, 4.0]])
    bars = torch.tensor([1.0, 2.5]).expand(3, 2)
    assert decide(scores, bars)[0].tolist() == [0, 1, 1]
    ids, margins = decide(scores, bars, per_batch=True)
    assert ids.tolist() == [0, 0, 0] and margins.tolist() == [2.0, 2.0, 2.0]
    assert decide(scores, bars + 5, per_batch=True)[0].tolist() == [NONE] * 3
    with pytest.raises(ValueError, match=r"ids of the 2 tasks, at least one; got \[\]"):
        fitted(make("gaussian"), tasks=2).select(task_data(0)[0], allowed=[])
    with pytest.raises(ValueError, match=r"ids of the 2 tasks, at least one; got \[0, 2\]"):
        fitted(make("gaussian"), tasks=2).select(task_data(0)[0], allowed=[0, 2])
    selector = fitted(make("gaussian", per_batch=True))
    assert len(selector.select(task_data(1, seed=1)[0])[0].unique()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_selector(kind):
    first, second = fitted(make(kind, seed=3)), fitted(make(kind, seed=3))
    for ours, other in zip(first.own, second.own, strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in ours.items())


# -------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_and_go_on(kind, tmp_path):
    """A loaded selector fits a further task as the original does: nothing old is needed."""
    selector = fitted(make(kind, source=PatchTokens(1)), tasks=2)
    save_selector(selector, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["selector.json", "selector.safetensors"]
    loaded = load_selector(tmp_path)
    assert loaded.source == PatchTokens(1) and loaded.options() == selector.options() and loaded.width == WIDTH
    for one in (selector, loaded):
        one.fit("task 2", [task_data(2)], texts(2))
    test = torch.cat([task_data(task, seed=1)[0] for task in range(4)])
    for ours, other in zip(selector.judge(test), loaded.judge(test), strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kind", KINDS)
def test_in_parts_only_what_is_new_is_written(kind, tmp_path):
    selector = make(kind, reject_rate=0.2)
    for task in range(3):
        parts = {path: path.read_bytes() for path in tmp_path.glob("task_*")}
        written = {path: path.stat().st_mtime_ns for path in parts}
        selector.fit(f"task {task}", [task_data(task)], texts(task))
        save_selector(selector, tmp_path, in_parts=True)
        assert len(list(tmp_path.glob("task_*.safetensors"))) == task + 1
        assert parts == {path: path.read_bytes() for path in parts}
        assert written == {path: path.stat().st_mtime_ns for path in parts}
        loaded, test = load_selector(tmp_path), torch.cat([task_data(task, seed=1)[0] for task in range(4)])
        for ours, other in zip(selector.judge(test), loaded.judge(test), strict=True):
            assert torch.equal(ours, other)
    (tmp_path / "task_0002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="No task_0002.safetensors in"):
        load_selector(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_growth_per_task(kind, tmp_path):
    selector = fitted(make(kind), tasks=1)
    sizes = [sum(tensor.nbytes for tensor in [*selector.own[0].values()]) + selector.shared_bytes]
    for task in (1, 2):
        selector.fit(f"task {task}", [task_data(task)], texts(task))
        total = sum(t.nbytes for own in selector.own for t in own.values()) + selector.shared_bytes
        assert total - sizes[-1] == selector.bytes_per_task
        sizes.append(total)


def test_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no selector"):
        load_selector(tmp_path)
    save_selector(fitted(make("gaussian")), tmp_path)
    described = json.loads((tmp_path / "selector.json").read_text())
    del described["checksums"]  # as in older releases, whose files say less about what is wrong

    def with_changes(**changes):
        (tmp_path / "selector.json").write_text(json.dumps({**described, **changes}))

    for changes, message in (
        ({"format_version": 99}, "reads up to 1"),
        ({"kind": "oracle"}, "Unknown selector 'oracle'"),
        ({"source": {"kind": "dreams"}}, "Unknown feature source 'dreams'"),
        ({"tasks": ["task 0"]}, "does not fit selector.json"),
        ({"options": {"wings": 2}}, "is damaged"),
    ):
        with_changes(**changes)
        with pytest.raises(ValueError, match=message):
            load_selector(tmp_path)
    with_changes()
    tensors = load_file(tmp_path / "selector.safetensors")
    save_file({name: t for name, t in tensors.items() if name != "tasks.1.means"}, tmp_path / "selector.safetensors")
    with pytest.raises(ValueError, match="tasks.1.means.* missing"):
        load_selector(tmp_path)
    (tmp_path / "selector.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_selector(tmp_path)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("kind", KINDS)
def test_bad_features(kind):
    with pytest.raises(RuntimeError, match="call `fit"):
        make(kind).select(torch.zeros(2, WIDTH))
    selector = fitted(make(kind), tasks=2)
    kept = [dict(own) for own in selector.own]
    x, labels = task_data(2)
    nan = x.clone()
    nan[140, 3] = float("nan")
    for features, message in (
        ([(x[:, :5], labels)], "have width 5, but the selector was fitted with width 12"),
        ([(x[:99], labels[:99]), (nan[99:], labels[99:])], r"NaN or infinite for 1 of 51 images \(rows \[41\]\)"),
        ([], "has 0 images"),
        ([(x[0], labels)], "shape \\(images, width\\)"),
    ):
        with pytest.raises(ValueError, match=message):
            selector.fit("task 2", features, texts(2))
    with pytest.raises(ValueError, match="fitted already"):
        selector.fit("task 1", [(x, labels)], texts(1))
    assert selector.tasks == ["task 0", "task 1"] and len(selector.own) == 2, "a failed fit leaves no trace"
    assert all(
        torch.equal(own[name], before[name]) for own, before in zip(selector.own, kept, strict=True) for name in own
    )
    with pytest.raises(ValueError, match="to select by are NaN"):
        selector.select(nan)
    with pytest.raises(ValueError, match="width 5"):
        selector.select(x[:, :5])


def test_what_else_is_needed():
    x, _ = task_data(0)
    with pytest.raises(ValueError, match="need labels"):
        PrototypeSelector().fit("a", x)
    with pytest.raises(ValueError, match="needs labels"):
        GaussianSelector(per_class=True).fit("a", x)
    with pytest.raises(ValueError, match="text embeddings"):
        TextSelector().fit("a", x)
    with pytest.raises(ValueError, match=r"\(3, 5\) can't be compared"):
        TextSelector().fit("a", x, torch.zeros(3, 5))
    for options in ({"reject_rate": 1.0}, {"reject_rate": -0.1}, {"held_out": 0.0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            GaussianSelector(**options)
    with pytest.raises(ValueError, match="`iterations`"):
        AutoencoderSelector(iterations=0)
    with pytest.raises(ValueError, match="`depth`"):
        PatchTokens(-1)
    assert GaussianSelector().source == ImageFeatures()


def test_few_images_fall_back_to_shrinkage_and_say_so():
    selector = GaussianSelector(held_out=0.2)
    with pytest.warns(UserWarning, match="fewer than a covariance of 12 features needs") as said:
        selector.fit("few", task_data(0, images=9)[0])
    assert any("held-out images, too few" in str(warning.message) for warning in said)
    assert selector.decision_function(task_data(0, seed=1)[0]).isfinite().all()
    with pytest.warns(UserWarning, match="shrunk by 100%"):
        selector = GaussianSelector(held_out=1e-9)
        selector.fit("one", task_data(0, images=1)[0])
    assert selector.decision_function(task_data(0, seed=1)[0]).isfinite().all()
