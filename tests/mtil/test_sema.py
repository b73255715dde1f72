"""SEMA: what adapters add, when a layer grows, and what then learns."""

# ruff: noqa: F401, F811 -- fixtures are imported

from dataclasses import replace

import pytest
import torch
from small_methods import SETTINGS, make, run, some_batch, tasks

from peft_moe_merge.mtil.methods import MethodSettings
from peft_moe_merge.mtil.methods.sema import Adapters


@pytest.fixture
def sema(make):
    def method(**changed):
        torch.manual_seed(0)
        return make("sema", MethodSettings(**{**vars(SETTINGS), **changed}))

    return method


def test_adapters_token_by_token():
    torch.manual_seed(0)
    mlp = torch.nn.Linear(6, 6)
    layer = Adapters(mlp)
    x = torch.randn(2, 5, 6)
    assert torch.equal(layer(x), mlp(x)), "none yet"
    for _ in range(3):
        layer.grow(6, 4, x)
        assert torch.equal(layer(x), mlp(x)) or len(layer.adapters) > 1, "a fresh one adds nothing"
        with torch.no_grad():
            for weight in (*layer.adapters[-1].parameters(), *layer.columns[-1].parameters()):
                weight.normal_()
    y = layer(x)
    for image in range(2):
        seen = x[image].mean(0) / x[image].mean(0).norm()
        scores = [column(seen).item() for column in layer.columns]
        shares = torch.tensor(scores).softmax(0)
        for token in range(5):
            expected = mlp(x[image, token])
            for share, adapter in zip(shares, layer.adapters, strict=True):
                hidden = (adapter[0].weight @ x[image, token] + adapter[0].bias).clamp_min(0)
                expected = expected + share * (adapter[2].weight @ hidden + adapter[2].bias)
            torch.testing.assert_close(y[image, token], expected, atol=1e-5, rtol=1e-5)


def learn_somehow(method, task):
    """Train a little and end the task; return the parameters that changed."""
    before = {name: weight.clone() for name, weight in method.model.named_parameters()}
    method.begin_task(task)
    optimizer = torch.optim.SGD(method.trainable_parameters() or [torch.zeros(1)], lr=0.5)
    for _ in range(2 if method.trainable_parameters() else 0):
        method.loss(method.model, some_batch(classes=3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.end_task()
    names = {name.replace(".mlp.mlp.", ".mlp."): weight for name, weight in method.model.named_parameters()}
    before = {name.replace(".mlp.mlp.", ".mlp."): weight for name, weight in before.items()}
    return {name for name, weight in names.items() if name not in before or not torch.equal(weight, before[name])}


def test_only_what_is_new_learns(sema, tasks):
    method = sema(sema_layers=2)
    for position, task in enumerate(tasks):
        changed = learn_somehow(method, task)
        assert method.history() == {"grown": ["block_1", "block_2"]}
        assert changed and all(
            name.startswith(("vision_model.encoder.layers.1.mlp.", "vision_model.encoder.layers.2.mlp."))
            and f".{position}." in name.partition(".mlp.")[2]
            for name in changed
        )
        assert {name.partition(".mlp.")[2].partition(".")[0] for name in changed} == {"adapters", "columns"}


def test_a_layer_grows_where_all_z_scores_are_above_the_threshold(sema, tasks):
    method = sema()
    for task in tasks[:2]:
        learn_somehow(method, task)
    method.task = tasks[2]
    inputs = method.layer_inputs()
    for layer, x in inputs.items():
        usual = []
        for position, task in enumerate(tasks[:2]):
            network = method.descriptors[layer].own[position]
            method.task = task

            def errors(inputs, network=network):
                target = inputs.double().sigmoid()
                down, down_bias, up, up_bias = (
                    network[f"{at}_{kind}"].double() for at in ("down", "up") for kind in ("weight", "bias")
                )
                guess = ((target @ down.T + down_bias).clamp_min(0) @ up.T + up_bias).sigmoid()
                return (guess - target).square().mean(dim=1)

            if (
                position == 1
            ):  # the first one's inputs were others: its task has been trained since, in shallower layers
                own = errors(method.layer_inputs()[layer])
                torch.testing.assert_close(
                    method.usual_2K[layer][:, 1], torch.stack([own.mean(), own.std()]), rtol=1e-3, atol=0
                )
            mean, deviation = method.usual_2K[layer][:, position]
            usual.append(((errors(x) - mean) / deviation).mean().item())
        for threshold in (min(usual) - 0.01, min(usual) + 0.01):
            method.settings.sema_threshold = threshold
            assert method.is_new(layer, x) == all(z > threshold for z in usual)


def test_a_task_that_is_new_nowhere_takes_no_steps(run, tasks):
    settings = MethodSettings(**{**vars(SETTINGS), "sema_threshold": 1e9, "sema_always": 0})
    progress = run("sema", settings=settings)
    assert [len(losses) for losses in progress.losses] == [3, 0, 0]
    assert [of_task["grown"] for of_task in progress.history] == [["block_0", "block_1", "block_2"], [], []]
    assert progress.matrix[0] == progress.matrix[1] == progress.matrix[2]


def test_images_seen_before_are_not_new_and_noise_is(sema, tasks):
    method = sema(sema_threshold=1.0, sema_always=0)
    learn_somehow(method, tasks[0])
    method.begin_task(replace(tasks[0], name="again"))
    assert method.grown == [] and method.trainable_parameters() == []
    method.settings.sema_always = 2
    method.begin_task(replace(tasks[0], name="and again"))
    assert method.grown == ["block_1", "block_2"], "without asking"
    noise = {layer: 3 * torch.randn(50, 64) for layer in method.layers}
    assert all(method.is_new(layer, x) for layer, x in noise.items())


@pytest.mark.parametrize(
    "changed", [{"sema_layers": 0}, {"sema_r": 0}, {"sema_bottleneck": 0}, {"sema_always": -1}, {"sema_lr": 0.0}]
)
def test_settings_are_checked(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` must"):
        MethodSettings(**changed)
