"""The expert pool: every task has experts of its own, which compute, train and count as they should."""

import math
import re

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from pools import (
    OUT,
    WIDTHS,
    all_tensors,
    check_against_slow,
    clip_pool,
    config_of,
    images_of,
    inputs,
    net_pool,
    same_tensors,
    train,
    trainable,
)

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.optimizer import loraplus_groups


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5,), (5, 4)])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 3), (3, 1), (3, 2)])
def test_outputs_and_gradients_are_those_of_the_slow_sum(per_task, top_k, shape, training):
    model = net_pool(experts_per_task=per_task, top_k=top_k).train(training)
    for task in ("a", "c"):
        model.set_task(task)
        check_against_slow(model, inputs(*shape))
        check_against_slow(model, inputs(*shape), [2, -1, 0, 2, 1])
        check_against_slow(model, inputs(*shape), [2, 1, 0, 2, 1])
        check_against_slow(model, inputs(*shape), [1] * 5)
        check_against_slow(model, inputs(*shape), [-1] * 5)


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"expert_activation": "gelu", "merge_strategy": "average"}])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_other_scales_and_activations(per_task, top_k, fields):
    model = net_pool(experts_per_task=per_task, top_k=top_k, **fields)
    check_against_slow(model, inputs(5, 4))
    check_against_slow(model, inputs(5, 4), [2, -1, 0, 2, 1])
    check_against_slow(model.eval(), inputs(5, 4), [2, 1, 0, 2, 1])


@pytest.mark.parametrize("shape", [(5,), (5, 4)])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_tokens_decide_for_themselves(per_task, top_k, shape):
    model = net_pool(experts_per_task=per_task, top_k=top_k, routing="token")
    check_against_slow(model, inputs(*shape))
    check_against_slow(model, inputs(*shape), [2, -1, 0, 2, 1])


@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_two_columns_may_lead_to_one_expert(top_k, routing):
    model = net_pool(experts_per_task=3, top_k=top_k, routing=routing)
    model.train()
    model(inputs(8, 2, seed=5))
    merges = model.merge_experts()
    assert merges.keys() == WIDTHS.keys()
    for block, known in model.experts_of_task("a").items():
        assert len(known) == 3 and len(set(known)) == 2
        assert merges[block].second not in known and merges[block].target == merges[block].first
    check_against_slow(model, inputs(5, 4))
    check_against_slow(model, inputs(5), [2, -1, 0, 2, 0])
    check_against_slow(model.eval(), inputs(5), [2, 1, 0, 2, 0])
    for seed in range(3):  # a single sample goes a way of its own
        check_against_slow(model, inputs(1, 4, seed=seed))
        check_against_slow(model, inputs(3, 4, seed=seed), [-1, 0, -1])
    # with every column in the sum, nothing is left to choose; down to one expert the router has no say at all
    model.merge_experts()
    assert all(len(set(known)) == 1 for known in model.experts_of_task("a").values())
    check_against_slow(model, inputs(5, 4))


def test_tasks_of_different_widths_in_one_batch():
    model = net_pool(tasks=["a"], num_experts="grow", task_experts="shared", merge_routing="keep", merge_at="steps")
    model.freeze_experts(0)
    model.train()
    model(inputs(5, 4))
    model.freeze_experts(2)
    model.add_task("b")
    assert {block: len(known) for block, known in model.experts_of_task("b").items()} == dict.fromkeys(WIDTHS, 4)
    randomize(model)
    model.set_task("b")
    check_against_slow(model, inputs(5, 4), [1, 0, 1, -1, 1])


# ----------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_routers_store_their_own_columns_alone(experts):
    T, r = 4, 3
    model = net_pool(tasks=[f"t{task}" for task in range(T)], experts_per_task=experts, top_k=experts, r=r)
    in_pool = {name: parameter for name, parameter in model.named_parameters() if "moe_lora_" in name}
    per_task = sum(experts * r * (D + O) + D * experts for D, O in WIDTHS.values())  # noqa: E741
    assert sum(parameter.numel() for parameter in in_pool.values()) == T * per_task
    assert sum(parameter.numel() for parameter in trainable(model).values()) == per_task - (
        sum(D for D, _ in WIDTHS.values()) if experts == 1 else 0  # a softmax over one score is 1: nothing to learn
    )
    model.add_task("later")
    assert all(len(bank) == (T + 1) * experts for bank in model.expert_banks().values())
    for block, (D, _) in WIDTHS.items():
        for task in ("t0", "later"):
            assert {name: tuple(w.shape) for name, w in model.router_parameters(block, task).items()} == {
                "weight": (D, experts)
            }
    assert not any("noise" in name for name in model.state_dict())


def test_without_noise_training_and_evaluation_agree():
    model = net_pool(experts_per_task=3, top_k=2)
    x, ids = inputs(5, 4), torch.tensor([0, 1, -1, 2, 2])
    trained, mixed = model.train()(x), model(x, task_ids=ids)
    assert torch.equal(model.eval()(x), trained) and torch.equal(model(x, task_ids=ids), mixed)
    noisy = net_pool(experts_per_task=3, top_k=2, router_noise=0.5).train()
    assert any("noise_weight" in name for name in noisy.state_dict())
    assert not torch.equal(noisy(x), noisy(x))


# ------------------------------------------------------------------------------------- one task leaves others alone


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (2, 1)])
def test_training_a_task_changes_no_output_of_another(per_task, top_k):
    model = clip_pool(["a", "b", "c"], experts_per_task=per_task, top_k=top_k)
    pool = [parameter for name, parameter in model.named_parameters() if "moe_lora_" in name]
    # one optimizer with all of the pool, and momentum of the task before: the worst there is
    optimizer = torch.optim.AdamW(pool, lr=1e-2, weight_decay=0.5)
    train(model, "a", optimizer=optimizer)
    a, b, c = (images_of(model, task) for task in "abc")
    train(model, "b", optimizer=optimizer)
    assert torch.equal(images_of(model, "a"), a) and torch.equal(images_of(model, "c"), c)
    assert not torch.equal(images_of(model, "b"), b)


def test_own_experts_and_router_train_and_nothing_else():
    model = net_pool()
    for task in ("b", None, "c", "a"):
        model.set_task(task)
        expected = set()
        for block in WIDTHS if task else ():
            expected |= {
                id(p) for e in model.experts_of_task(task)[block] for p in model.expert_banks()[block].parameters_of(e)
            }
            index = config_of(model).tasks.index(task)
            expected |= {id(model.router_banks()[block].weight[index])}
        assert {id(parameter) for parameter in trainable(model).values()} == expected
    own = [set(model.experts_of_task(task)["first"]) for task in "abc"]
    assert not own[0] & own[1] and not own[0] & own[2] and not own[1] & own[2]


@pytest.mark.parametrize("per_task", [1, 2, 3])
def test_every_trainable_parameter_gets_a_gradient(per_task):
    model = clip_pool(experts_per_task=per_task, top_k=per_task)
    for merged in (False, True):
        model.set_task("b")
        model(**tiny_batch()).logits_per_image.sin().sum().backward()
        without = [name for name, parameter in trainable(model).items() if parameter.grad is None]
        assert trainable(model) and not without, without[:3]
        model.zero_grad()
        if not merged and per_task > 1:
            assert model.merge_experts()


def test_usage_counts_rows_and_prompts():
    model = clip_pool(["a", "b"])
    model(**tiny_batch(images=4))
    model(**tiny_batch(images=4), task_ids=torch.tensor([0, -1, 1, 0]))
    model.eval()
    model(**tiny_batch(images=4))
    for block, counts in model.expert_usage("a").items():
        rows = 3 + 3 if block.startswith("text_model") else 4 + 2  # prompts are encoded once for each task there is
        own = model.experts_of_task("a")[block]
        assert counts.tolist() == [rows if expert in own else 0 for expert in range(4)]
    assert {c.sum().item() for name, c in model.expert_usage("b").items() if name.startswith("vision")} == {2 * 1}


# ---------------------------------------------------------------------------------------------- precision and dropout


def test_dropout_acts_in_training_alone():
    model = net_pool(lora_dropout=0.5)
    x = inputs(4, 3)
    assert not torch.equal(model.train()(x), model(x))
    check_against_slow(model.eval(), x)


def test_dropout_keeps_the_mean():
    model = net_pool(lora_dropout=0.3, target_modules=["second"])
    x = inputs(4)
    plain = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    rows = model(x.repeat(4000, 1)).reshape(4000, 4, OUT)
    spread = rows.std(dim=0) / math.sqrt(4000)
    assert ((rows.mean(dim=0) - plain).abs() < 5 * spread + 1e-12).all()


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_half_precision(per_task, top_k):
    torch.manual_seed(0)
    fields = {"tasks": ["a", "b"], "r": 2, "experts_per_task": per_task, "top_k": top_k}
    model = get_peft_model(tiny_clip().to(torch.bfloat16), MoELoraMergeConfig.pool(**fields)).train()
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    model.add_task("c")
    for ids in (None, torch.tensor([0, 2, -1, 0])):
        output = model(**batch, task_ids=ids).logits_per_image
        output.float().sum().backward()
        assert output.isfinite().all()
    assert all(
        parameter.grad.isfinite().all() for parameter in trainable(model).values() if parameter.grad is not None
    )


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_autocast(per_task, top_k):
    model = clip_pool(["a", "b"], experts_per_task=per_task, top_k=top_k)
    exact = model(**tiny_batch()).logits_per_image
    for ids in (None, torch.tensor([0, 1, -1, 0])):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**tiny_batch(), task_ids=ids).logits_per_image
        output.float().sum().backward()
        assert output.isfinite().all()
        if ids is None and per_task == top_k:  # where a choice is close, half precision may choose otherwise
            torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.2)


# ---------------------------------------------------------------------------------------------------------- LoRA plus


def test_loraplus_groups():
    model = clip_pool(["a", "b"])
    model.set_task("b")
    slow, fast = loraplus_groups(model, lr=1e-3, ratio=4)
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    up = {id(p) for bank in model.expert_banks().values() for p in bank.up_weight if p.requires_grad}
    assert {id(parameter) for parameter in fast["params"]} == up
    every = [id(parameter) for group in (slow, fast) for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in trainable(model).values())
    before = all_tensors(model)
    train(model, "b", steps=1, optimizer=torch.optim.SGD([slow, fast]))
    assert not same_tensors(before, all_tensors(model))
    for ratio in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            loraplus_groups(model, lr=1e-3, ratio=ratio)
    model.set_task(None)
    with pytest.raises(ValueError, match="set_task"):
        loraplus_groups(model, lr=1e-3, ratio=4)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fields, way_out",
    [
        ({"num_experts": 3, "tasks": ["a", "b"]}, "need 4, the pool has 3.*merge_at='pool_full'"),
        ({"max_experts": 3, "tasks": ["a", "b"]}, "need 4, the pool has 3.*add_task"),
        ({"experts_per_task": 3, "max_experts": 2}, "raise `max_experts` or lower `experts_per_task`"),
        ({"experts_per_task": 3, "num_experts": 2}, "raise `num_experts` or lower `experts_per_task`"),
        ({"num_experts": 4, "max_experts": 4}, "num_experts='grow'"),
        ({"task_experts": "shared", "merge_at": "steps"}, "task_experts='reserved', or merge_routing='keep'"),
        ({"expert_activation": "relu"}, "expert_activation='identity', or 'average' or 'aligned'"),
        ({"merge_routing": "keep"}, "merge_routing='redirect'"),
        ({"top_k": 3}, "lower `top_k` or raise `experts_per_task`"),
        ({"num_experts": "shrink"}, "positive integer, or 'grow', got 'shrink'"),
        ({"num_experts": True}, "positive integer"),
        ({"max_experts": 0}, "positive integer"),
        ({"experts_per_task": 0, "top_k": 0}, "positive integer"),
        ({"router_noise": -0.1}, "at least 0"),
        ({"router_noise": float("nan")}, "at least 0"),
        ({"expert_activation": "sine"}, "must be one of"),
        ({"merge_at": "never"}, "must be one of"),
        ({"task_experts": "own"}, "must be one of"),
    ],
)
def test_contradictions_are_refused(fields, way_out):
    with pytest.raises(ValueError, match=way_out):
        MoELoraMergeConfig.pool(**fields)


def test_the_advice_for_contradictions_is_followed():
    for fields in (
        {"num_experts": 4, "tasks": ["a", "b"]},
        {"experts_per_task": 3, "max_experts": 3},
        {"task_experts": "shared", "merge_routing": "keep", "merge_at": "steps"},
        {"expert_activation": "relu", "merge_strategy": "aligned"},
        {"top_k": 3, "experts_per_task": 3},
    ):
        config = MoELoraMergeConfig.pool(**fields)
        assert all(getattr(config, name) == value for name, value in fields.items())


def test_a_taken_name_changes_nothing():
    model = net_pool()
    before = all_tensors(model)
    with pytest.raises(ValueError, match=re.escape("'b' is named twice")):
        model.add_task("b")
    assert same_tensors(all_tensors(model), before)
