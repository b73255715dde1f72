"""A callback and its task: resumed in the middle, disturbed by an evaluation, merging late, with noise that calms down."""

import json

import pytest
import torch
from peft import get_peft_model
from test_callback import BLOCK, PROMPTS, adapted, images, trainer, weights
from torch import nn

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback, RouterNoiseCallback
from peft_moe_merge.callbacks import TaskCallback


def pooled(**kwargs):
    return adapted(
        **{
            "num_experts": 8,
            "task_experts": "reserved",
            "experts_per_task": 4,
            "merge_routing": "redirect",
            "merge_at": "task_end",
            **kwargs,
        }
    )


def loop(model, callback, steps=10, between=lambda: None, total_steps=None):
    """Train on one task, with something done between the optimizer's step and the callback's."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = images()
    model.train()
    torch.manual_seed(1)
    callback.begin_task(model, total_steps=total_steps)
    for step in range(steps):
        batch = rows[4 * step : 4 * step + 4]
        logits = model(pixel_values=torch.stack([row["pixel_values"] for row in batch]), **PROMPTS).logits_per_image
        nn.functional.cross_entropy(logits, torch.tensor([row["labels"] for row in batch])).backward()
        optimizer.step()
        optimizer.zero_grad()
        between()
        callback.step(model, optimizer)
        model.set_task("a")
    between()
    callback.end_task(model)
    model.set_task("a")


MADE = {
    "merge": lambda: ExpertMergeCallback(merge_every=3),
    "stop": lambda: RouterFreezeCallback(at_step=9),
    "gate gap": lambda: RouterFreezeCallback(gap=0.02, explore=2),
    "noise": lambda: RouterNoiseCallback(share=0.9),
}


@pytest.mark.parametrize("restores", [False, True], ids=["by itself", "by the Trainer"])
@pytest.mark.parametrize("made", list(MADE))
def test_resumed_in_the_middle_of_a_task_equals_not_stopping(tmp_path, made, restores):
    kwargs = {"save_strategy": "steps", "save_steps": 7, "max_steps": 10}
    kwargs |= {"restore_callback_states_from_checkpoint": restores}
    straight, callback = adapted(), MADE[made]()
    trainer(straight, tmp_path, callback, **kwargs).train()
    checkpoint = tmp_path / "checkpoint-7"
    stored = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"][type(callback).__name__]
    assert stored["attributes"]["progress"]["steps"] == 7

    resumed = adapted()
    run = trainer(resumed, tmp_path, MADE[made](), **kwargs)
    run.train(resume_from_checkpoint=str(checkpoint))
    [again] = [each for each in run.callback_handler.callbacks if isinstance(each, TaskCallback)]
    assert again.progress == callback.progress and again.steps == 10 and again.task == "a"
    if made == "merge":
        assert [step for step, _ in again.merges] == [3, 6, 9] and again.merges == callback.merges
    if made == "stop":
        assert set(again.stops.values()) == {9}
    if made == "gate gap":
        assert any(any(flags) for flags in again.progress["flags"].values())
    expected, actual = weights(straight), weights(resumed)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert straight.peft_config["default"].router_noise == resumed.peft_config["default"].router_noise


def test_routers_that_stopped_before_the_interruption_keep_their_step():
    model, callback = adapted(), RouterFreezeCallback(at_step=2)
    loop(model, callback, steps=4)
    again = RouterFreezeCallback.from_state(json.loads(json.dumps(callback.state())))
    again.begin_task(model, steps=4)
    again.step(model, torch.optim.SGD([torch.zeros(1)]))
    assert again.steps == 5 and set(again.stops) == set(model.frozen_experts()) and set(again.stops.values()) == {2}


def test_state_of_another_task_is_not_taken_up():
    model, callback = adapted(), ExpertMergeCallback(merge_every=2)
    loop(model, callback, steps=4)
    model.set_task("b")
    callback.begin_task(model, steps=3)
    assert callback.merges == [] and callback.steps == 3 and callback.task == "b"


def test_the_state_survives_json():
    model, callback = adapted(), ExpertMergeCallback(merge_every=2)
    loop(model, callback, steps=4)
    again = ExpertMergeCallback.from_state(json.loads(json.dumps(callback.state())))
    assert again.merges == callback.merges and again.merges[0][1][BLOCK].target >= 0
    assert again.state() == callback.state()


@pytest.mark.parametrize("other", [None, "b"])
@pytest.mark.parametrize("made", ["merge", "stop", "gate gap"])
def test_an_evaluation_in_between_may_set_another_task(made, other):
    undisturbed, disturbed = adapted(), adapted()
    callbacks = MADE[made](), MADE[made]()
    loop(undisturbed, callbacks[0], steps=12)
    loop(disturbed, callbacks[1], steps=12, between=lambda: disturbed.set_task(other))
    assert callbacks[0].progress == callbacks[1].progress
    assert undisturbed.frozen_experts() == disturbed.frozen_experts()
    assert undisturbed.stopped_routers() == disturbed.stopped_routers()
    expected, actual = weights(undisturbed), weights(disturbed)
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("made", list(MADE))
def test_no_task_is_set(made):
    model = adapted()
    model.set_task(None)
    with pytest.raises(ValueError, match=r"current_task=None\): call `model.set_task\(name\)`"):
        MADE[made]().begin_task(model, total_steps=5)
    model.set_task("a")
    MADE[made]().begin_task(model, total_steps=5)


@pytest.mark.parametrize(("merge_to", "rounds"), [(1, 3), (2, 2), (4, 0)])
def test_merging_at_the_end_of_a_task(merge_to, rounds):
    model, callback = pooled(), ExpertMergeCallback(merge_after=0.75, merge_to=merge_to)
    loop(model, callback, steps=8, total_steps=8)
    assert [step for step, _ in callback.merges] == [6] * rounds, "all at once, at 0.75 of 8 steps"
    for block, routers in model.router_banks().items():
        assert len(set(routers.experts_of(0))) == merge_to
        used = {e for e in routers.experts_of(0) if model.expert_usage()[block][e] > 0}
        assert set(model.frozen_experts()[block]) == used, "freeze_top_k=2 does not bound reserved experts"


def test_merging_at_the_end_of_a_task_needs_its_steps_and_redirection():
    with pytest.raises(ValueError, match=r"got total_steps=None: `begin_task\(model, total_steps=...\)`"):
        ExpertMergeCallback().begin_task(pooled())
    with pytest.raises(ValueError, match="'keep' does not: use task_experts='reserved' with merge_routing='redirect'"):
        ExpertMergeCallback().begin_task(pooled(merge_routing="keep"), total_steps=8)
    ExpertMergeCallback(merge_every=None).begin_task(pooled())


def test_a_full_pool_is_no_business_of_the_callback():
    model, callback = pooled(merge_at="pool_full"), ExpertMergeCallback(merge_every=1, freeze_top_k=0)
    loop(model, callback, steps=4)
    assert callback.merges == [] and not any(model.frozen_experts().values())


def test_noise_is_annealed_linearly_and_begins_anew():
    model, callback, seen = adapted(), RouterNoiseCallback(start=2.0, end=0.5, share=0.5), []
    loop(model, callback, steps=8, total_steps=8, between=lambda: seen.append(factor(model)))
    assert seen == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5, 0.5, 0.5, 0.5, 0.5])
    model.set_task("b")
    callback.begin_task(model, total_steps=8)
    assert factor(model) == 2.0
    with pytest.raises(ValueError, match=r"total_steps=None: `begin_task\(model, total_steps=...\)`"):
        callback.begin_task(model)


def factor(model):
    return model.peft_config["default"].router_noise


def test_noise_of_the_model():
    model = adapted(lora_dropout=0.0).train()
    pixels = torch.stack([row["pixel_values"] for row in images(8)])

    def decided():
        model.keep_routing_decisions(True)
        model(pixel_values=pixels, **PROMPTS)
        return model.routing_decisions()[BLOCK].probabilities_GE.detach()

    assert not torch.equal(decided(), decided())
    model.set_router_noise(0)
    assert torch.equal(decided(), decided())
    for wrong in (-1, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match="at least 0; got"):
            model.set_router_noise(wrong)
    config = MoELoraMergeConfig(num_experts=4, r=2, router_noise=0.0)
    silent = get_peft_model(adapted().unload(), config)
    silent.set_router_noise(0.0)
    with pytest.raises(ValueError, match="made without noise.*got factor=0.5"):
        silent.set_router_noise(0.5)


@pytest.mark.parametrize(
    ("made", "arguments", "message"),
    [
        (RouterFreezeCallback, {"gap": 1.0, "explore": -5}, "`explore` must be an integer, at least 0; got -5"),
        (RouterFreezeCallback, {"gap": 1.0, "explore": 1.5}, "`explore` must be an integer, at least 0; got 1.5"),
        (RouterFreezeCallback, {"at_step": -1}, "`at_step` must be an integer, at least 0; got -1"),
        (RouterFreezeCallback, {"at_step": True}, "`at_step` must be an integer, at least 0; got True"),
        (RouterFreezeCallback, {"at_fraction": True}, r"`at_fraction` must be a .* in \[0, 1\]; got True"),
        (RouterFreezeCallback, {"gap": 0}, "above 0; got 0"),
        (RouterFreezeCallback, {"gap": -0.5}, "`gap` must be a finite number, at least 0; got -0.5"),
        (RouterFreezeCallback, {"gap": float("nan")}, "finite number, at least 0; got nan"),
        (RouterFreezeCallback, {"gap": 1.0, "rule": "xx"}, "one of 'lt', 'gt'; got 'xx'"),
        (ExpertMergeCallback, {"merge_every": 1.5}, "`merge_every` must be an integer, at least 1; got 1.5"),
        (ExpertMergeCallback, {"freeze_top_k": True}, "`freeze_top_k` must be an integer, at least 0; got True"),
        (ExpertMergeCallback, {"merge_to": 0}, "`merge_to` must be an integer, at least 1; got 0"),
        (ExpertMergeCallback, {"merge_after": 1.2}, r"in \[0, 1\]; got 1.2"),
        (RouterNoiseCallback, {"start": -1}, "`start` must be a finite number, at least 0; got -1"),
        (RouterNoiseCallback, {"end": float("inf")}, "`end` must be a finite number, at least 0; got inf"),
        (RouterNoiseCallback, {"share": 2}, r"in \[0, 1\]; got 2"),
    ],
)
def test_nonsense_is_refused(made, arguments, message):
    with pytest.raises(ValueError, match=message):
        made(**arguments)
