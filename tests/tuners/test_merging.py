"""Who merges, how, and who freezes: decisions against cases worked out by hand, unions against the functions they are of."""

import pytest
import torch

from peft_moe_merge.tuners.moe_lora_merge.pool import Merge, aligned, average, choose_merge, favourites


def expert(seed, rank=4, width=6):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"down_weight": (rank, width), "down_bias": (rank,), "up_weight": (rank, width), "up_bias": (width,)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def output(expert, x):
    hidden = torch.relu(x @ expert["down_weight"].T + expert["down_bias"])
    return hidden @ expert["up_weight"] + expert["up_bias"]


def merge(counts, frozen=(), pair="most_used", experts=expert):
    frozen_E = torch.zeros(len(counts), dtype=torch.bool)
    frozen_E[list(frozen)] = True
    return choose_merge(torch.tensor(counts), frozen_E, experts, pair)


@pytest.mark.parametrize(
    ("counts", "frozen", "expected"),
    [
        ([5, 1, 9, 3], (), Merge(target=1, first=2, second=0)),
        ([0, 0, 7, 4, 0], (), Merge(target=0, first=2, second=3)),  # ties: the lowest index gives way
        ([0, 0, 7, 4, 0], (0, 1), Merge(target=4, first=2, second=3)),  # a frozen expert never gives way
        ([5, 1, 9, 3], (2, 0), Merge(target=1, first=2, second=0)),  # but may be a source
        ([4, 4, 4, 4], (), Merge(target=2, first=0, second=1)),  # ties among the most used: lowest first
        ([5, 1, 9], (1,), None),  # nobody left to overwrite
        ([9, 9], (), None),  # fewer than three
        ([0, 0, 0, 0], (), None),  # nothing counted
    ],
)
def test_choice(counts, frozen, expected):
    assert merge(counts, frozen) == expected


def test_a_single_selected_expert_still_has_a_partner():
    assert merge([0, 8, 0, 0]) == Merge(target=2, first=1, second=0)


def test_most_similar_pair_looks_past_the_order_of_hidden_units():
    twins = expert(3)
    permuted = {n: t if n == "up_bias" else t[[2, 0, 3, 1]] for n, t in twins.items()}
    bank = [expert(0), twins, expert(1), permuted, expert(2), expert(4)]
    # 0 and 2 are the most used, 1 and 3 compute the same; 4 and 5 are seldom used
    assert merge([90, 60, 80, 50, 1, 2], pair="most_similar", experts=bank.__getitem__) == Merge(4, 1, 3)
    assert merge([90, 1, 1, 1], pair="most_similar", experts=bank.__getitem__) == Merge(2, 0, 1)


def test_average_is_the_mean_of_every_tensor():
    first, second = expert(0), expert(1)
    union = average(first, second)
    for name in first:
        torch.testing.assert_close(union[name], (first[name] + second[name]) / 2, rtol=0, atol=0)


def test_aligned_undoes_a_permutation_that_average_stumbles_over():
    first = expert(0)
    shuffled = {n: t if n == "up_bias" else t[[3, 1, 0, 2]] for n, t in first.items()}
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(output(shuffled, x), output(first, x))
    for name, tensor in aligned(first, shuffled).items():
        torch.testing.assert_close(tensor, first[name])
    assert (output(average(first, shuffled), x) - output(first, x)).abs().max() > 0.1


def test_aligned_finds_the_best_of_all_permutations():
    from itertools import permutations

    first, second = expert(5, rank=4), expert(6, rank=4)

    def units(e):
        parts = [e["down_weight"], e["down_bias"][:, None], e["up_weight"]]
        return torch.cat([part / part.norm() for part in parts], dim=1)

    def total(order):
        return (units(first) * units(second)[list(order)]).sum()

    best = list(max(permutations(range(4)), key=total))
    torch.testing.assert_close(
        aligned(first, second)["down_weight"], (first["down_weight"] + second["down_weight"][best]) / 2
    )


def test_favourites():
    assert favourites(torch.tensor([3, 9, 0, 4]), 2) == [1, 3]
    assert favourites(torch.tensor([3, 3, 3, 0]), 2) == [0, 1]
    assert favourites(torch.tensor([0, 0, 5, 0]), 2) == [2]  # an expert nobody took is nobody's favourite
    assert favourites(torch.tensor([1, 2]), 0) == []
