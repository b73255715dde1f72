"""Losses on routers, and routers that stop: in the tuner, the Trainer and a loop."""

import copy

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback

BLOCK = "vision_model.encoder.layers.0.mlp"


def adapted(**kwargs):
    torch.manual_seed(0)
    config = MoELoraMergeConfig(**{"num_experts": 6, "r": 4, "tasks": ["a", "b"], "lora_dropout": 0.0, **kwargs})
    return get_peft_model(tiny_clip(), config).train()


def train(model, callbacks=(), steps=10, lr=3e-2, weight=0.0, total=None):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)
    for callback in callbacks:
        kwargs = {"total_steps": total} if isinstance(callback, RouterFreezeCallback) else {}
        callback.begin_task(model, **kwargs)
    history = []
    for step in range(steps):
        logits = model(**tiny_batch(seed=step)).logits_per_image
        loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
        (loss + model.auxiliary_loss() if weight else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        for callback in callbacks:
            callback.step(model, optimizer)
        history.append(copy.deepcopy({b: model.router_parameters(b, "a") for b in model.frozen_experts()}))
    for callback in callbacks:
        callback.end_task(model)
    return history


def changed(history, block, step):
    return any(
        not torch.equal(history[step - 1][block][n], history[step - 2][block][n]) for n in ("weight", "noise_weight")
    )


def test_auxiliary_loss_is_the_weighted_mean_over_blocks():
    model = adapted(router_balance_loss=0.5, router_locality_loss=2.0)
    train(model, steps=3, weight=1)  # experts have moved since the first call
    marked = {
        b: [model.expert_parameters(b, e)["up_weight"].clone() for e in range(6)] for b in model.frozen_experts()
    }
    model.set_landmark()
    train(model, steps=2, lr=1e-2, weight=1)
    model(**tiny_batch(seed=9))
    losses = []
    for block, decisions in model.routing_decisions().items():
        counts = torch.bincount(decisions.indices_GK.flatten(), minlength=6).double()
        probabilities = decisions.probabilities_GE.double()
        balance = 6 * (counts / counts.sum() * probabilities.mean(dim=0)).sum()
        locality = 0.0
        bank = model.expert_banks()[block]
        for row, chosen in zip(probabilities, decisions.indices_GK.tolist(), strict=True):
            for expert in chosen:
                tensors = bank.expert(expert)
                moved = sum((tensors[n] - bank.landmark[expert][n]).double().square().sum() for n in tensors).sqrt()
                assert torch.equal(bank.landmark[expert]["up_weight"], marked[block][expert])
                locality = locality + row[expert] * moved / len(probabilities)
        losses.append(0.5 * balance + 2.0 * locality)
    assert len(losses) == 4
    torch.testing.assert_close(model.auxiliary_loss().double(), torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_only_routers_feel_it():
    model = adapted(router_balance_loss=1.0, router_locality_loss=1.0)
    train(model, steps=2, weight=1)
    model.zero_grad()
    model(**tiny_batch())
    model.auxiliary_loss().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # deeper routers read what earlier experts wrote, so experts may feel it through the residual stream; those of the
    # last blocks can't
    last = [name for name in touched if "layers.1" in name]
    assert last and all("routers" in name for name in last)


def test_a_model_can_be_copied_between_forward_and_backward():
    model = adapted(router_balance_loss=1.0)
    model(**tiny_batch())
    twin = copy.deepcopy(model)
    assert model.auxiliary_loss().requires_grad
    with pytest.raises(RuntimeError, match="no routing decisions"):  # those were of a call of the original
        twin.auxiliary_loss()
    assert model.bake_task("a").peft_config["default"].tasks == ["a"]


def test_balance_loss_balances():
    """From skewed routers, with no other loss: the load evens out."""
    model = adapted(router_balance_loss=1.0)
    randomize(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.0)

    def imbalance():
        model.reset_expert_usage()
        for step in range(30):
            model(**tiny_batch(seed=100 + step))
        shares = [counts.double() / counts.sum() for counts in model.expert_usage().values()]
        return torch.stack([share.square().sum() for share in shares]).mean()

    before = imbalance()
    for step in range(60):
        model(**tiny_batch(seed=step))
        model.auxiliary_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert imbalance() < 0.9 * before


def test_no_decisions_no_loss():
    model = adapted()
    model(**tiny_batch())
    assert model.auxiliary_loss() == 0.0 and model.routing_decisions() == {}
    model = adapted(router_balance_loss=1.0)
    with pytest.raises(RuntimeError, match="after a forward pass in training mode"):
        model.auxiliary_loss()
    model.set_task(None)
    model(**tiny_batch())
    with pytest.raises(RuntimeError, match="with a task set"):
        model.auxiliary_loss()
    with pytest.raises(ValueError, match="`router_balance_loss` is the weight of a loss, at least 0; got -1"):
        MoELoraMergeConfig(router_balance_loss=-1)


@pytest.mark.parametrize("arguments", [{"at_step": 4}, {"at_fraction": 0.4}])
def test_routers_stop_and_experts_go_on(arguments):
    model = adapted()
    callback = RouterFreezeCallback(**arguments)
    before = [model.expert_parameters(BLOCK, e)["up_weight"].clone() for e in range(6)]
    history = train(model, [callback, ExpertMergeCallback(merge_every=5)], total=10)
    assert set(callback.stops) == set(model.frozen_experts()) and set(callback.stops.values()) == {4}
    for block in callback.stops:
        assert any(changed(history, block, step) for step in (2, 3, 4))
        assert not any(changed(history, block, step) for step in range(5, 11)), "a stopped router never changes"
    assert any(not torch.equal(before[e], model.expert_parameters(BLOCK, e)["up_weight"]) for e in range(6))
    assert sorted(model.stopped_routers()) == sorted(model.frozen_experts())
    model.set_task("b")
    assert model.stopped_routers() == []
    trainable = [name for name, p in model.named_parameters() if "routers" in name and p.requires_grad]
    assert len(trainable) == 8 and all(name.endswith(".1") for name in trainable), "the next task's routers learn"


def test_gate_gap_test_stops_block_by_block():
    model = adapted()
    wide = RouterFreezeCallback(gap=1e6, explore=3)
    train(model, [wide])
    assert set(wide.stops.values()) == {4} and len(wide.stops) == 4, (
        "everything is tied: stopped right after exploration"
    )
    model = adapted()
    narrow = RouterFreezeCallback(gap=1e-9, explore=3)
    history = train(model, [narrow])
    assert narrow.stops == {} and model.stopped_routers() == []
    assert any(changed(history, BLOCK, step) for step in range(6, 11))
    assert model.routing_decisions() == {} or not model.router_banks()[BLOCK].keep_decisions


def test_the_flags_are_those_of_the_rule():
    model = adapted()
    callback = RouterFreezeCallback(gap=0.05, explore=2)
    flags, stops = {}, {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    callback.begin_task(model)
    for step in range(1, 13):
        logits = model(**tiny_batch(seed=step)).logits_per_image
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        for block, decisions in model.routing_decisions().items():
            if step > 2 and block not in stops:
                scores = decisions.scores_GE.mean(dim=0).tolist()
                winners = sorted(scores, reverse=True)[:2]
                tied = {e for e, score in enumerate(scores) if min(abs(score - w) for w in winners) < 0.05}
                flags[block] = flags.get(block, set()) | tied
                if len(flags[block]) == 6:
                    stops[block] = step
        optimizer.step()
        optimizer.zero_grad()
        callback.step(model, optimizer)
    assert callback.stops == stops and stops


def test_stopped_routers_are_saved(tmp_path):
    model = adapted()
    model.stop_routers([BLOCK])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True)
    assert loaded.stopped_routers() == [BLOCK]
    expected = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == expected
    assert sum("routers" in name and value for name, value in expected.items()) == 3 * 2
    with pytest.raises(KeyError, match="No adapted block 'x'"):
        model.stop_routers(["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"at_step": 3, "gap": 0.1}, "exactly one of .*at_step=3.*gap=0.1"),
        ({"at_fraction": 1.5}, r"in \[0, 1\]; got 1.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RouterFreezeCallback(**arguments)


def test_models_without_routers():
    with pytest.raises(TypeError, match="MoELoraMergeConfig.*got CLIPModel"):
        RouterFreezeCallback(at_step=3).begin_task(tiny_clip())
    with pytest.raises(ValueError, match="total_steps"):
        RouterFreezeCallback(at_fraction=0.5).begin_task(adapted())
