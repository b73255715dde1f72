"""The pool grows with its tasks, and old experts merge where it may not."""

import copy

import pytest
import torch
from pools import (
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
from torch import nn

from peft_moe_merge.tuners.moe_lora_merge.pool import favourites, most_alike, product


def test_the_pool_grows_with_its_tasks_and_nothing_moves():
    model = clip_pool(["a"], learnt=False, r=1, experts_per_task=1, top_k=1, target_modules=["fc1"])
    train(model, "a", steps=2)
    first, plain = images_of(model, "a"), images_of(model, None)
    assert not torch.equal(first, plain)
    for step in range(49):
        model.add_task(f"t{step}")
        assert torch.equal(images_of(model, f"t{step}"), plain)  # new experts add nothing yet
        train(model, f"t{step}", steps=1)
        assert torch.equal(images_of(model, "a"), first), step
    assert all(len(bank) == 50 for bank in model.expert_banks().values())
    assert len(config_of(model).tasks) == 50 and config_of(model).pool_size == 50


def fill(model):
    """Train on random inputs so that selections are counted; weights stay."""
    for task in config_of(model).tasks:
        model.set_task(task)
        model.train()
        model(inputs(4))


@pytest.mark.parametrize("bound", [{"max_experts": 5}, {"num_experts": 5}])
def test_a_full_pool_refuses_and_names_the_way_out(bound):
    model = net_pool(["a", "b"], merge_at="steps", **bound)
    fill(model)
    before, config = all_tensors(model), config_of(model).to_dict()
    trains = set(trainable(model))
    with pytest.raises(ValueError, match=r"pool is full.*num_experts='grow'.*merge_at='pool_full'"):
        model.add_task("c")
    assert same_tensors(all_tensors(model), before) and config_of(model).to_dict() == config
    assert set(trainable(model)) == trains
    # the advised ways
    for way in ({"num_experts": "grow"}, {**bound, "merge_at": "pool_full"}):
        model = net_pool(["a", "b"], **{"merge_at": "steps", **way})
        model.add_task("c")
        model.set_task("c")
        check_against_slow(model, inputs(3))


@pytest.mark.parametrize("bound", [{"max_experts": 5}, {"num_experts": 5}])
def test_a_full_pool_merges_its_most_alike_pair(bound):
    model = net_pool(["a", "b"], **bound)
    fill(model)
    with torch.no_grad():  # expert 1 of a and expert 2 of b are nearly one update, in other bases
        for bank in model.expert_banks().values():
            torch.manual_seed(7)
            basis = torch.randn(3, 3, dtype=torch.float64)
            bank.down_weight[2].copy_(basis @ bank.down_weight[1])
            bank.up_weight[2].copy_(torch.linalg.inv(basis).T @ bank.up_weight[1] * 1.01)
    updates = {
        block: [bank.expert(e)["up_weight"].T @ bank.expert(e)["down_weight"] for e in range(len(bank))]
        for block, bank in model.expert_banks().items()
    }
    model.add_task("c")  # needs two, finds the one that grew or was left, and makes the other
    for block, bank in model.expert_banks().items():
        assert len(bank) == 5
        assert model.experts_of_task("a")[block] == [0, 1] and model.experts_of_task("b")[block] == [1, 3]
        assert sorted(model.experts_of_task("c")[block]) == [2, 4]
        union = bank.expert(1)["up_weight"].T @ bank.expert(1)["down_weight"]
        torch.testing.assert_close(union, (updates[block][1] + updates[block][2]) / 2)
        for expert in (2, 4) if "max_experts" in bound else (2,):  # the tests gave weights to one that nobody had yet
            assert not bank.up_weight[expert].any() and bank.down_weight[expert].any()
        for expert in (0, 3):  # the others stay
            torch.testing.assert_close(bank.up_weight[expert].T @ bank.down_weight[expert], updates[block][expert])
        assert model.expert_usage("a")[block].tolist() == [4, 4, 0, 0, 0]
        assert model.expert_usage("b")[block].tolist() == [0, 4, 0, 4, 0]
    model.set_task("c")
    assert all(model.expert_banks()["first"].up_weight[expert].requires_grad for expert in (2, 4))
    check_against_slow(model, inputs(4), [0, 1, 2, -1])


def test_a_freed_place_is_trainable_though_its_expert_was_frozen():
    model = net_pool(["a", "b"], num_experts=4)
    for task in ("a", "b"):
        model.set_task(task)
        model.train()
        model(inputs(4))
        model.freeze_experts(2)
    assert model.frozen_experts() == {block: [0, 1, 2, 3] for block in WIDTHS}
    model.add_task("c")
    for block, known in model.experts_of_task("c").items():
        assert len(known) == 2 and not set(known) & set(model.frozen_experts()[block])
        assert len(model.frozen_experts()[block]) == 2
    model.set_task("c")
    outputs = [model.eval()(inputs(4), task_ids=torch.full((4,), task)) for task in (0, 1)]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model.train()(inputs(4)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for task, output in enumerate(outputs):
        assert torch.equal(model(inputs(4), task_ids=torch.full((4,), task)), output)


def test_a_long_stream_fits_into_a_bounded_pool():
    model = net_pool(["t0"], max_experts=5)
    for step in range(1, 9):
        model.add_task(f"t{step}")
        model.set_task(f"t{step}")
        for parameter in trainable(model).values():
            nn.init.normal_(parameter)
        assert all(len(bank) <= 5 for bank in model.expert_banks().values())
        own = model.experts_of_task(f"t{step}")["first"]
        others = {e for task in range(step) for e in model.experts_of_task(f"t{task}")["first"]}
        assert len(set(own)) == 2 and not set(own) & others
    check_against_slow(model, inputs(10), [*range(9), -1])


def test_untrained_experts_make_room_as_well():
    model = net_pool(["a", "b"], learnt=False, num_experts=4)
    plain = model(inputs(3))
    model.add_task("c")
    assert torch.equal(model(inputs(3)), plain)
    assert all(len(set(known)) == 2 for known in model.experts_of_task("c").values())


def test_a_pool_for_one_task_alone_cannot_make_room():
    model = net_pool(["a"], max_experts=2)
    before, config = all_tensors(model), config_of(model).to_dict()
    with pytest.raises(ValueError, match="pool is full.*max_experts"):
        model.add_task("b")
    assert same_tensors(all_tensors(model), before) and config_of(model).to_dict() == config
    # one place more and it can
    model = net_pool(["a"], max_experts=3)
    model.add_task("b")
    check_against_slow(model, inputs(4), [0, 1, 0, 1])


# ----------------------------------------------------------------------------------------------- the union's weights


def an_expert(seed, r=3, D=7, O=5):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    return {
        "down_weight": torch.randn(r, D, generator=generator, dtype=torch.float64),
        "up_weight": torch.randn(r, O, generator=generator, dtype=torch.float64),
    }


def update(expert):
    return expert["down_weight"].T @ expert["up_weight"]


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("r, D, O", [(3, 7, 5), (2, 4, 9), (4, 5, 4), (1, 6, 6), (5, 3, 4)])
def test_product_is_the_best_of_its_rank(r, D, O, share):  # noqa: E741
    first, second = an_expert(1, r, D, O), an_expert(2, r, D, O)
    union = product(first, second, share)
    assert all(union[name].shape == first[name].shape for name in first)
    best = truncated(share * update(first) + (1 - share) * update(second), r)
    torch.testing.assert_close(update(union), best, rtol=0, atol=1e-10)


def test_product_does_not_depend_on_the_bases():
    first, second = an_expert(1), an_expert(2)
    torch.manual_seed(0)
    turned = []
    for expert in (first, second):
        basis = torch.randn(3, 3, dtype=torch.float64)
        turned.append(
            {
                "down_weight": basis @ expert["down_weight"],
                "up_weight": torch.linalg.inv(basis).T @ expert["up_weight"],
            }
        )
    torch.testing.assert_close(update(product(*turned, 0.3)), update(product(first, second, 0.3)))


def test_a_merge_weighs_by_usage():
    model = net_pool(["a"], experts_per_task=2, top_k=1)
    model.train()
    for seed in range(3):
        model(inputs(16, seed=seed))
    before = {block: [bank.expert(e) for e in range(2)] for block, bank in model.expert_banks().items()}
    before, usage = copy.deepcopy(before), model.expert_usage()
    merges = model.merge_experts()
    for block, merge in merges.items():
        share = usage[block][0].item() / 48
        assert 0 < share < 1 and share != 0.5
        full = share * update(before[block][0]) + (1 - share) * update(before[block][1])
        union = update(model.expert_banks()[block].expert(merge.target))
        torch.testing.assert_close(union, truncated(full, 3), rtol=0, atol=1e-10)


def test_most_alike_looks_at_updates_not_at_factors():
    experts = [an_expert(seed) for seed in range(4)]
    experts[3] = {
        "down_weight": experts[1]["down_weight"][[2, 0, 1]] * 5,
        "up_weight": experts[1]["up_weight"][[2, 0, 1]],
    }
    assert most_alike([0, 1, 2, 3], experts.__getitem__) == (1, 3)
    assert most_alike([2], experts.__getitem__) is None


def test_favourites_are_a_tasks_own():
    usage = torch.tensor([9, 8, 7, 2, 1, 0])
    assert favourites(usage, 2) == [0, 1]
    assert favourites(usage, 2, own=[3, 4]) == [3, 4] and favourites(usage, 1, own=[3, 4]) == [3]
    assert favourites(usage, 2, own=[4, 5]) == [4]
    model = net_pool(["a", "b"])
    for routers in model.router_banks().values():
        routers.usage[1] = torch.tensor([1, 2])
    assert model.freeze_experts(2, task="b") == {block: [2, 3] for block in WIDTHS}
    assert model.freeze_experts(1, task="b") == {block: [] for block in WIDTHS}


def test_a_union_and_the_freed_place_start_without_momentum():
    model = net_pool(["a"], experts_per_task=3, top_k=3).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    model(inputs(4)).sin().sum().backward()
    optimizer.step()
    merges = model.merge_experts(optimizer)
    for block, merge in merges.items():
        bank = model.expert_banks()[block]
        for expert in range(3):
            known = [parameter in optimizer.state for parameter in bank.parameters_of(expert)]
            assert known == [expert not in (merge.first, merge.second)] * 2
        assert not any(parameter.requires_grad for parameter in bank.parameters_of(merge.second))  # nobody's now
        assert not bank.up_weight[merge.second].any()
