"""RAIL: the regression against the paper's recursion and against all images at once, and the rule of fusion."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from small_methods import SETTINGS, make, run, tasks

from peft_moe_merge.inference.zero_shot import class_features
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

SEED = 5


@pytest.fixture
def rail(make):
    def method(**changed):
        torch.manual_seed(SEED)
        return make("rail", MethodSettings(**{**vars(SETTINGS), **changed}))

    return method


@torch.no_grad()
def hidden(method, task, split="train"):
    """The random layer on features of the plain CLIP, in float64, and the labels."""
    rows = getattr(task, split)
    images = [image.convert("RGB") for image in rows["image"]]
    pixels = method.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    features = F.normalize(method.model.get_image_features(pixels).pooler_output, dim=-1).double()
    draw = torch.Generator().manual_seed(SEED)
    layer = torch.randn(features.shape[1], SETTINGS.rail_features, generator=draw, dtype=torch.float64)
    return (features @ layer / features.shape[1] ** 0.5).clamp_min(0), torch.tensor(rows["label"]), pixels


def test_weights_are_those_of_the_recursion_and_of_all_images_at_once(rail, tasks):
    ridge = 0.02
    method = rail(rail_ridge=ridge)
    size, memory, recursive = SETTINGS.rail_features, None, None
    memory = torch.eye(size, dtype=torch.float64) / ridge
    recursive = torch.zeros(size, 0, dtype=torch.float64)
    everything, targets = [], []
    for task in tasks:
        method.learn(task)
        x, labels, _ = hidden(method, task)
        # the paper's update of its memory matrix, by the Woodbury identity, and of the weights
        inner = torch.linalg.inv(torch.eye(len(x)).double() + x @ memory @ x.T)
        memory = memory - memory @ x.T @ inner @ x @ memory
        new = memory @ x.T @ F.one_hot(labels, len(task.class_names)).double()
        recursive = torch.cat([recursive - memory @ x.T @ x @ recursive, new], dim=1)
        torch.testing.assert_close(method.weights_MS.double(), recursive, atol=1e-4, rtol=1e-4)
        everything.append(x)
        targets.append(F.one_hot(labels, len(task.class_names)).double())
    x, y = torch.cat(everything), torch.block_diag(*targets)
    gram = x.T @ x + ridge * torch.eye(size)
    torch.testing.assert_close(method.weights_MS.double(), torch.linalg.solve(gram, x.T @ y), atol=1e-4, rtol=1e-4)
    assert [parameter.shape for parameter in method.trainable_parameters()] == [(size, 10)]


def test_the_order_of_tasks_makes_no_difference(rail, tasks):
    one, other = rail(), rail()
    for task in tasks:
        one.learn(task)
    for task in tasks[::-1]:
        other.learn(task)
    rows = [other.prompts.index(prompt) for prompt in one.prompts]
    torch.testing.assert_close(one.weights_MS, other.weights_MS[:, rows], atol=1e-8, rtol=1e-6)


def test_images_are_fused_where_clip_chooses_a_learnt_class(tasks):
    """Among the classes of all tasks, two of three learnt; image by image, class by class."""
    share = 0.7
    torch.manual_seed(SEED)
    settings = MethodSettings(**{**vars(SETTINGS), "rail_fusion": share})
    method = METHODS["rail"](*load_clip(mini_clip_path()), settings)  # one that does not choose one class always
    for task in tasks[:2]:
        method.learn(task)
    classes = LabelSpace.of_all(tasks)
    with torch.no_grad():
        x, _, pixels = hidden(method, tasks[2], "test")
        texts = class_features(method.model, method.processor.tokenizer, classes.prompts)
        cosines = method.image_features(pixels) @ texts.T
        scores = method.scorer(classes, torch.device("cpu"))(pixels)
        likely = (method.model.logit_scale.exp() * cosines).softmax(dim=1)
    outputs = x @ method.weights_MS.double()
    learnt, fused = 7, []
    for row in range(len(pixels)):
        best = max(range(10), key=likely[row].tolist().__getitem__)
        fused.append(best < learnt)
        for column in range(10):
            expected = likely[row, column].item()
            if best < learnt:
                expected = (1 - share) * expected + share * (outputs[row, column].item() if column < learnt else 0.0)
            assert scores[row, column].item() == pytest.approx(expected, abs=1e-4)
    assert any(fused) and not all(fused), "both happen"


def test_a_task_not_learnt_is_left_to_clip(run):
    matrix, zero_shot = run("rail").matrix, run("zero_shot").matrix[0]
    for row in range(3):
        assert matrix[row][row + 1 :] == zero_shot[row + 1 :]
    assert all(matrix[row][row] > zero_shot[row] + 20 for row in range(3)), "digits are learnt from random features"


def test_among_the_classes_of_all_tasks_in_the_stream(tasks, tmp_path):
    """X-TAIL as the stream runs it, against counting by hand. CLIP, which knows few digits, decides who is asked."""
    settings = StreamSettings(protocol="x_tail", lr=[1e-3])

    def build():
        return METHODS["rail"](*load_clip(mini_clip_path()), SETTINGS)

    progress = run_stream(tasks, build, settings, tmp_path, Accelerator(cpu=True), seed=SEED, stop_after=2)
    ((selector, decision, accuracies),) = progress.x_tail[-1]
    assert selector is None and decision is None
    method = build()
    method.load(tmp_path / "after_2")
    with torch.no_grad():
        scores = method.scorer(LabelSpace.of_all(tasks), torch.device("cpu"))
    first = 0
    for task, accuracy in zip(tasks, accuracies, strict=True):
        images = [image.convert("RGB") for image in task.test["image"]]
        pixels = method.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            chosen = scores(pixels).argmax(dim=1) - first
        hits = sum(int(one == label) for one, label in zip(chosen.tolist(), task.test["label"], strict=True))
        assert accuracy == pytest.approx(100 * hits / len(images))
        first += len(task.class_names)


@pytest.mark.parametrize("changed", [{"rail_features": 0}, {"rail_ridge": 0.0}, {"rail_fusion": 1.5}])
def test_settings_are_checked(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` must"):
        MethodSettings(**changed)
