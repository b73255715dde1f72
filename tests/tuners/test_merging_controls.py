"""The controls of merging: a pair that is drawn, and one expert kept in place of a union."""

import pytest
import torch
from pools import clip_pool, config_of, images_of, randomize

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.pool import choose_room, keep_used, random_pair


def no_experts(index):
    raise AssertionError("a drawn pair looks at no expert")


def test_a_drawn_pair_is_of_the_experts_that_are_open():
    drawn = set()
    for count in range(60):
        usage_E = torch.tensor([3, -1, count, 0, -1, 7])
        pair = random_pair(usage_E, no_experts)
        assert pair == random_pair(usage_E.clone(), no_experts), "the same counts, the same pair"
        assert len(set(pair)) == 2 and set(pair) <= {0, 2, 3, 5}
        drawn.add(frozenset(pair))
        first, second = sorted(pair)
        room = choose_room([5, 0, 3, 2], torch.tensor([3, 9, count, 0, 9, 7]), no_experts, "random")
        assert room == (first, first, second), "whatever those count that nobody uses"
    assert len(drawn) == 6, "every pair comes up"


def test_the_more_selected_one_is_kept():
    first, second = ({"down_weight": torch.randn(2, 3), "up_weight": torch.randn(2, 4)} for _ in range(2))
    for share, kept in ((0.9, first), (0.5, first), (0.2, second)):
        union = keep_used(first, second, share)
        assert all(torch.equal(union[name], kept[name]) for name in kept)
        assert all(union[name].data_ptr() != kept[name].data_ptr() for name in kept)


@pytest.mark.parametrize("pair", ["most_similar", "random"])
def test_a_full_pool_keeps_one_of_two(pair):
    fields = {"max_experts": 3, "experts_per_task": 1, "top_k": 1, "merge_strategy": "keep_used", "merge_pair": pair}
    model = clip_pool(["a", "b", "c"], **fields)
    randomize(model)
    usage = {"a": 9, "b": 2, "c": 5}
    for index, count in enumerate(usage.values()):
        for routers in model.router_banks().values():
            routers.usage[index] = count
    before = {
        block: {
            task: [bank.expert(e)["down_weight"].clone() for e in model.experts_of_task(task)[block]] for task in usage
        }
        for block, bank in model.expert_banks().items()
    }
    model.add_task("d")
    assert all(len(bank) == 3 for bank in model.expert_banks().values())
    for block, bank in model.expert_banks().items():
        experts = {task: model.experts_of_task(task)[block][0] for task in usage}
        (together,) = [
            {task for task in usage if experts[task] == e}
            for e in set(experts.values())
            if list(experts.values()).count(e) > 1
        ]
        winner = max(together, key=usage.get)
        for task, expert in experts.items():
            was = before[block][winner if task in together else task][0]
            assert torch.equal(bank.expert(expert)["down_weight"], was)
        assert model.experts_of_task("d")[block][0] not in experts.values()
    assert torch.isfinite(images_of(model, "a")).all() and config_of(model).tasks[-1] == "d"


@pytest.mark.parametrize("wrong", [{"merge_pair": "least"}, {"merge_strategy": "keep"}])
def test_other_words_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        MoELoraMergeConfig.pool(**wrong)
