"""InfLoRA: its directions against singular value decompositions of the inputs themselves."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy

import pytest
import torch
from small_methods import SETTINGS, make, tasks

from peft_moe_merge.mtil.methods import MethodSettings

LAYERS = ("vision_model.encoder.layers.1.mlp.fc1", "text_model.encoder.layers.0.self_attn.q_proj")


@pytest.fixture
def inflora(make):
    def method(**changed):
        return make("inflora", MethodSettings(**{**vars(SETTINGS), "inflora_images": 1000, **changed}))

    return method


@torch.no_grad()
def inputs_of(method, clip, task):
    """All inputs of two layers, F x N in float64: every training image, and every prompt without its padding."""
    images = [image.convert("RGB") for image in task.train["image"]]
    pixels = method.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    seen = {}
    modules = {name: clip.get_submodule(name) for name in LAYERS}
    handles = [
        module.register_forward_hook(lambda m, x, y, name=name: seen.setdefault(name, []).append(x[0].double()))
        for name, module in modules.items()
    ]
    clip.get_image_features(pixels)
    for prompt in task.prompts(task.templates[0]):  # each by itself: nothing is padded
        clip.get_text_features(**method.tokenize([prompt]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in parts]).T for name, parts in seen.items()}


def projector(basis):
    return basis @ torch.linalg.pinv(basis)


def disturb_ups(method, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in method.model.named_parameters():
            if weight.requires_grad:
                assert ".lora_B." in name, "only the up projections learn"
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


def folded(method):
    """The model as it is while a task trains, without PEFT."""
    return copy.deepcopy(method.model).merge_and_unload()


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_directions_by_singular_values(inflora, tasks, threshold, tmp_path):
    method = inflora(inflora_threshold=threshold)
    taken = {}  # by layer: what GPM says, in the words of its paper
    for seed, task in enumerate(tasks):
        method.begin_task(task)
        before = inputs_of(method, folded(method), task)
        for name, x in before.items():
            down = method.layers()[name].lora_A["default"].weight.double()
            new = x if name not in taken else x - taken[name] @ taken[name].T @ x
            left = torch.linalg.svd(new, full_matrices=False)[0][:, : SETTINGS.lora_r]
            torch.testing.assert_close(projector(down.T), left @ left.T, atol=1e-3, rtol=0)
            torch.testing.assert_close(down @ down.T, torch.eye(len(down)).double() / 3, atol=1e-5, rtol=0)
        disturb_ups(method, seed)
        after = inputs_of(method, folded(method), task)
        method.end_task()
        for name, x in after.items():
            old = taken.get(name, x.new_zeros(len(x), 0))
            left, values, _ = torch.linalg.svd(x - old @ old.T @ x, full_matrices=False)
            count, within = 0, (old.T @ x).square().sum()
            while within < threshold * x.square().sum():
                within += values[count] ** 2
                count += 1
            taken[name] = torch.cat([old, left[:, :count]], dim=1)
            free = method.free[name]
            assert free.shape[1] == len(x) - taken[name].shape[1]
            torch.testing.assert_close(
                free @ free.T, torch.eye(len(x)) - taken[name] @ taken[name].T, atol=1e-3, rtol=0, check_dtype=False
            )
    method.save(tmp_path)
    loaded = inflora(inflora_threshold=threshold)
    loaded.load(tmp_path)
    assert all(torch.equal(basis, loaded.free[name]) for name, basis in method.free.items())


def test_old_inputs_do_not_see_a_new_task(inflora, tasks):
    """What tasks have taken comes out as before, to the share that the threshold grants."""
    method = inflora(inflora_threshold=1.0)
    method.begin_task(tasks[0])
    disturb_ups(method, 0)
    old = inputs_of(method, folded(method), tasks[0])
    method.end_task()
    weights = {name: method.model.get_submodule(name).weight.double() for name in LAYERS}
    method.begin_task(tasks[1])
    disturb_ups(method, 1)
    method.end_task()
    name = LAYERS[1]  # the first block's inputs are few: they do not fill the space
    change = method.model.get_submodule(name).weight.double() - weights[name]
    assert change.norm() > 0.1
    assert (change @ old[name]).abs().max() < 1e-3 * (change.norm() * old[name].norm(dim=0).mean())


def test_no_direction_is_left(inflora, tasks):
    """With all of its inputs taken, a layer that images fill learns nothing more."""
    method = inflora(inflora_threshold=1.0)
    for seed, task in enumerate(tasks[:2]):
        method.begin_task(task)
        disturb_ups(method, seed)
        down = {name: method.layers()[name].lora_A["default"].weight.detach().clone() for name in LAYERS}
        method.end_task()
    assert method.free[LAYERS[0]].shape[1] < SETTINGS.lora_r
    assert (down[LAYERS[0]].norm(dim=1) == 0).sum() >= SETTINGS.lora_r - method.free[LAYERS[0]].shape[1] - 1


@pytest.mark.parametrize("changed", [{"inflora_lr": 0.0}, {"inflora_images": 0}, {"inflora_threshold": 0.0}])
def test_settings_are_checked(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` must"):
        MethodSettings(**changed)
