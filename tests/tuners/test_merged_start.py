"""A task's experts start from those of the tasks before it, merged, and these stay as they are."""

import pytest
import torch
from pools import WIDTHS, all_tensors, clip_pool, config_of, images_of, inputs, net_pool, same_tensors, train

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.expert_pool import STARTS_FROM
from peft_moe_merge.tuners.moe_lora_merge.pool import merged_start


def update_of(model, block, task):
    """What a task's experts add at equal gates, as one matrix O x D."""
    bank, config = model.expert_banks()[block], config_of(model)
    known = model.experts_of_task(task)[block]
    scale = config.lora_alpha / config.r / len(known)
    return sum(scale * bank.up_weight[expert].T @ bank.down_weight[expert] for expert in known).detach()


def best_of_rank(matrix, rank):
    u, size, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * size[:rank] @ v[:rank]


@pytest.mark.parametrize("experts, r", [(1, 2), (2, 1), (2, 2), (3, 1), (2, 5)])
@pytest.mark.parametrize("tasks", [["a"], ["a", "b", "c"]])
def test_it_is_the_best_approximation_of_the_mean(tasks, experts, r):
    model = net_pool(tasks, experts_per_task=experts, top_k=experts, r=r, expert_start="merged")
    before, answers = (
        all_tensors(model),
        [model(inputs(5), task_ids=torch.full((5,), task)) for task in range(len(tasks))],
    )
    model.add_task("new")
    for block, (D, O) in WIDTHS.items():  # noqa: E741
        mean = sum(update_of(model, block, task) for task in tasks) / len(tasks)
        expected = best_of_rank(mean, min(experts * r, D, O))
        torch.testing.assert_close(update_of(model, block, "new"), expected, rtol=1e-10, atol=1e-10)
    x, new = inputs(5, 4), torch.full((5,), len(tasks))
    first, second = (getattr(model.get_base_model(), block).get_base_layer() for block in WIDTHS)
    hidden = torch.tanh(first(x) + x @ update_of(model, "first", "new").T)
    expected = second(hidden) + hidden @ update_of(model, "second", "new").T
    torch.testing.assert_close(model(x, task_ids=new), expected, rtol=1e-10, atol=1e-10)
    # of the tasks before, nothing has moved
    now = all_tensors(model)
    same = {name for name in before if "usage" not in name and "stopped" not in name and "frozen" not in name}
    assert same_tensors({name: now[name] for name in same}, {name: before[name] for name in same})
    for task, answer in enumerate(answers):
        assert torch.equal(model(inputs(5), task_ids=torch.full((5,), task)), answer)


def test_rows_are_as_long_as_those_of_fresh_experts():
    torch.manual_seed(0)
    D, O, R = 400, 300, 8  # noqa: E741
    bound = D**-0.5
    tasks = [
        [{"down_weight": torch.empty(R, D).uniform_(-bound, bound), "up_weight": torch.randn(R, O)} for _ in range(2)]
        for _ in range(3)
    ]
    fresh = torch.cat([expert["down_weight"] for own in tasks for expert in own]).norm(dim=1).mean()
    sizes = []
    for expert in merged_start(tasks, 2):
        torch.testing.assert_close(expert["down_weight"].norm(dim=1), fresh.expand(R), rtol=0.02, atol=0)
        sizes.append(expert["up_weight"].norm(dim=1))
    # directions are dealt out in turns: the largest to the first, the next to the second, the third to the first
    dealt = torch.stack(sizes, dim=1).flatten()
    assert (dealt[:-1] >= dealt[1:]).all() and dealt[0] > dealt[-1]


def test_the_latest_tasks_count():
    model = net_pool(["t0"], expert_start="merged")
    for task in range(1, STARTS_FROM + 2):
        model.add_task(f"t{task}")
    generator = torch.Generator().manual_seed(1)
    for bank in model.expert_banks().values():
        for parameter in bank.parameters():
            parameter.data.normal_(generator=generator)
    latest = [f"t{task}" for task in range(2, STARTS_FROM + 2)]
    model.add_task("new")
    for block in WIDTHS:
        mean = sum(update_of(model, block, task) for task in latest) / STARTS_FROM
        torch.testing.assert_close(update_of(model, block, "new"), best_of_rank(mean, 5 if block == "second" else 6))


def test_a_stream_is_learnt_and_nothing_is_forgotten(tmp_path):
    model = clip_pool(["a"], learnt=False, expert_start="merged", experts_per_task=1, top_k=1)
    plain = images_of(model, None)
    assert torch.equal(images_of(model, "a"), plain)  # the first task has nothing to start from
    train(model, "a")
    first = images_of(model, "a")
    model.add_task("b")
    torch.testing.assert_close(images_of(model, "b"), first)  # with one task before, it is that one
    train(model, "b")
    assert not torch.allclose(images_of(model, "b"), first)
    assert torch.equal(images_of(model, "a"), first) and torch.equal(images_of(model, None), plain)
    model.save_pretrained(tmp_path)
    assert MoELoraMergeConfig.from_pretrained(tmp_path).expert_start == "merged"


def test_what_cannot_be_merged_is_refused_and_the_advice_helps():
    with pytest.raises(ValueError, match="expert_start='merged'.*'shared'.*use 'reserved' and 'identity'"):
        MoELoraMergeConfig(expert_start="merged")
    with pytest.raises(ValueError, match="expert_start='merged'.*'gelu'.*or expert_start='fresh'"):
        MoELoraMergeConfig.pool(expert_start="merged", expert_activation="gelu", merge_strategy="average")
    with pytest.raises(ValueError, match="must be one of .*'fresh', 'merged'.*'warm'"):
        MoELoraMergeConfig(expert_start="warm")
    helped = {"task_experts": "reserved", "expert_activation": "identity"}
    assert MoELoraMergeConfig(expert_start="merged", **helped).expert_start == "merged"
    assert MoELoraMergeConfig.pool(expert_start="fresh", expert_activation="gelu", merge_strategy="average")


def test_a_task_can_start_anew_from_tasks_of_ones_choice():
    model = net_pool(["a", "b", "c"])
    model.set_task("c")
    before = all_tensors(model)
    model.start_merged(earlier=["b"])
    for block, (D, O) in WIDTHS.items():  # noqa: E741
        expected = best_of_rank(update_of(model, block, "b"), min(6, D, O))
        torch.testing.assert_close(update_of(model, block, "c"), expected, rtol=1e-10, atol=1e-10)
    others = {name for name in before if not any(f".{expert}" == name[-2:] for expert in (4, 5))}
    assert same_tensors({name: all_tensors(model)[name] for name in others}, {name: before[name] for name in others})
    model.start_merged("c")
    for block, (D, O) in WIDTHS.items():  # noqa: E741
        mean = (update_of(model, block, "a") + update_of(model, block, "b")) / 2
        expected = best_of_rank(mean, min(6, D, O))
        torch.testing.assert_close(update_of(model, block, "c"), expected, rtol=1e-10, atol=1e-10)
    started = all_tensors(model)
    model.start_merged("a")  # before which there is none
    assert same_tensors(all_tensors(model), started)


def test_a_start_that_would_cost_a_task_what_it_knows_is_refused_and_the_advice_helps():
    model = net_pool(["a", "b"])
    with pytest.raises(ValueError, match="'b' can't start from itself: .*got \\['a', 'b'\\]"):
        model.start_merged("b", earlier=["a", "b"])
    with pytest.raises(ValueError, match="'nowhere'"):
        model.start_merged("b", earlier=["nowhere"])
    before = all_tensors(model)
    model.expert_banks()["second"].frozen[3] = True
    with pytest.raises(
        ValueError, match="'b' can't start anew: in second some are frozen.*Add a new task by `add_task`"
    ):
        model.start_merged("b")
    now = all_tensors(model)
    assert same_tensors(*({name: of[name] for name in of if "frozen" not in name} for of in (now, before)))
    model.add_task("c")
    model.start_merged("c")
    torch.testing.assert_close(
        update_of(model, "second", "c"), (update_of(model, "second", "a") + update_of(model, "second", "b")) / 2
    )
    shared = clip_pool(["a"], task_experts="shared", num_experts=4, merge_routing="keep", merge_at="steps")
    with pytest.raises(ValueError, match="task_experts='shared'.*`MoELoraMergeConfig.pool\\(\\)`"):
        shared.start_merged()
