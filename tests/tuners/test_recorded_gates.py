"""Which experts took part in a call: against routers that are read out one sample at a time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from pools import IN, config_of, inputs, net_pool

from peft_moe_merge import MoELoraMergeConfig

IDS = [2, -1, 0, 2, 1]


def by_hand(model, x, ids, block="first"):
    """The gates of each row, which is one sample or token."""
    routers, tasks = model.router_banks()[block], config_of(model).tasks
    gates = torch.zeros(len(x), routers.num_experts, dtype=torch.float64)
    for row, task in enumerate(ids):
        if task >= 0:
            experts = model.experts_of_task(tasks[task])[block]
            scores = x[row] @ routers.weight[task]
            best = scores.argsort(descending=True)[: config_of(model).top_k]
            for column, gate in zip(best.tolist(), scores[best].softmax(0), strict=True):
                gates[row, experts[column]] += gate
    return gates.detach()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"experts_per_task": 1, "top_k": 1},
        {"experts_per_task": 3, "top_k": 2},
        {"num_experts": 7, "task_experts": "shared", "top_k": 3, "merge_routing": "keep", "merge_at": "steps"},
    ],
    ids=["all of two", "one", "two of three", "shared"],
)
@pytest.mark.parametrize("ids", [IDS, [1] * 5, [-1] * 5, None], ids=["mixed", "one task", "plain", "current"])
def test_gates_are_those_of_the_routers(fields, ids):
    model = net_pool(**fields).eval()
    model.set_task("b")
    x = inputs(5, 4)
    with model.recorded_gates() as gates:
        output = model(x) if ids is None else model(x, task_ids=torch.tensor(ids))
    expected = by_hand(model, x[:, 0], [1] * 5 if ids is None else ids)
    if ids == [-1] * 5:
        assert gates == {}
    else:
        assert list(gates) == ["first", "second"] and all(len(passes) == 1 for passes in gates.values())
        torch.testing.assert_close(gates["first"][0], expected, rtol=0, atol=1e-12)
        assert not gates["first"][0].requires_grad
    again = model(x) if ids is None else model(x, task_ids=torch.tensor(ids))
    assert torch.equal(again, output), "looking changes nothing"
    assert len(gates.get("first", ())) <= 1, "behind the block nobody looks"


@pytest.mark.parametrize("fields", [{}, {"experts_per_task": 1, "top_k": 1}, {"experts_per_task": 3, "top_k": 2}])
def test_tokens_that_decide_for_themselves_are_rows(fields):
    model = net_pool(routing="token", **fields).eval()
    x = inputs(2, 3)
    with model.recorded_gates() as gates:
        model(x, task_ids=torch.tensor([1, 1]))
        model(x, task_ids=torch.tensor([-1, 2]))
    first, second = gates["first"]
    torch.testing.assert_close(first, by_hand(model, x.reshape(6, IN), [1] * 6), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, by_hand(model, x.reshape(6, IN), [-1] * 3 + [2] * 3), rtol=0, atol=1e-12)


def test_two_columns_of_one_expert_add_up():
    model = net_pool(tasks=("a", "b"), experts_per_task=3, top_k=3).eval()
    model.set_task("a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    model(inputs(4)).sum().backward()
    model.eval()
    config = config_of(model)
    assert config.merge_routing == "redirect"
    model.merge_experts(optimizer)
    assert len(set(model.experts_of_task("a")["first"])) < 3
    x = inputs(4)
    with model.recorded_gates() as gates:
        model(x)
    torch.testing.assert_close(gates["first"][0], by_hand(model, x, [0] * 4), rtol=0, atol=1e-12)
    torch.testing.assert_close(gates["first"][0].sum(1), torch.ones(4, dtype=torch.float64))


def test_a_clip_shows_both_towers():
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=6, r=4, tasks=["a", "b", "c"], lora_dropout=0.0)
    model = get_peft_model(tiny_clip(), config).eval()
    randomize(model)
    with torch.no_grad(), model.recorded_gates() as gates:
        model(**tiny_batch(), task_ids=torch.tensor([2, -1, 0, 2]))
    assert set(gates) == set(model.router_banks())
    for block, passes in gates.items():
        rows = [gates_BE.bool().sum(1).tolist() for gates_BE in passes]
        # images one pass with their tasks; the three prompts, whose decision is one, a pass for each task
        assert rows == ([[2, 0, 2, 2]] if block.startswith("vision") else [[2] * 3] * 2), block
    with torch.no_grad(), model.recorded_gates() as alone:
        model.get_image_features(tiny_batch()["pixel_values"], task_ids=torch.tensor([2, -1, 0, 2]))
    assert all(
        block.startswith("vision") and torch.equal(passes[0], gates[block][0]) for block, passes in alone.items()
    )


def test_training_is_seen_once_under_checkpointing():
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig.pool(tasks=["a"], r=2)).train()
    randomize(model)
    model.get_base_model().gradient_checkpointing_enable()
    with model.recorded_gates() as gates:
        model(**tiny_batch()).logits_per_image.sum().backward()
    assert len(gates) == len(model.router_banks()) and all(len(passes) == 1 for passes in gates.values())


def test_threads_and_blocks_within_blocks_do_not_mix():
    model = net_pool(experts_per_task=3, top_k=2).eval()
    barrier = Barrier(3)

    def look(task):
        x = inputs(4, seed=task)
        barrier.wait()
        with model.recorded_gates() as gates:
            for _ in range(5):
                model(x, task_ids=torch.tensor([task] * 4))
        return gates["first"], by_hand(model, x, [task] * 4)

    with ThreadPoolExecutor(3) as threads:
        for passes, expected in threads.map(look, range(3)):
            assert len(passes) == 5
            for gates_BE in passes:
                torch.testing.assert_close(gates_BE, expected, rtol=0, atol=1e-12)
    other = net_pool().eval()
    with model.recorded_gates() as outer:
        with pytest.raises(RuntimeError, match="stop"), model.recorded_gates() as inner:
            model(inputs(2))
            other(inputs(2))
            raise RuntimeError("stop")
        assert outer == {} and len(inner["first"]) == 1, "another model's calls are its own"
        model(inputs(2))
    assert len(outer["first"]) == 1


def test_a_compiled_model_tells_the_same():
    model = net_pool().eval()
    compiled, x = torch.compile(model, backend="eager"), inputs(3)
    with torch.no_grad():
        compiled(x)
        with model.recorded_gates() as gates:
            compiled(x)
        compiled(x)
    assert len(gates["first"]) == 1
    torch.testing.assert_close(gates["first"][0], by_hand(model, x, [0] * 3), rtol=0, atol=1e-12)
