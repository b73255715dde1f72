import math

import pytest
import torch

from peft_moe_merge.theory.simulate import Setting, simulate
from peft_moe_merge.theory.specialisation import (
    at_home,
    cluster_loads,
    evenness,
    expert_sets,
    gate_gap,
    loads,
    purity,
)


@pytest.fixture(scope="module")
def run():
    return simulate(Setting(experts=5, rounds=60), range(3))


def test_loads_count_rounds_by_expert_and_task(run):
    for first in (1, 31):
        expected = torch.zeros(3, 5, 6, dtype=torch.long)
        for s in range(3):
            for t in range(first - 1, 60):
                expected[s, run.experts_ST[s, t], run.tasks_ST[s, t]] += 1
        assert torch.equal(loads(run, first), expected)
        by_cluster = torch.stack([expected[:, :, c] + expected[:, :, c + 3] for c in range(3)], 2)
        assert torch.equal(cluster_loads(run, first), by_cluster)


def test_gate_gap_is_the_highest_minus_the_lowest_score(run):
    scores = run.scores_STMN[1, 40]
    expected = sum((max(scores[:, n]) - min(scores[:, n])) for n in range(6)) / 6
    torch.testing.assert_close(gate_gap(run)[1, 40], expected)


def test_an_expert_belongs_to_the_cluster_whose_signal_it_scores_highest(run):
    for s in range(3):
        for m in range(5):
            best = max(range(6), key=lambda n: run.scores_STMN[s, -1, m, n])
            assert expert_sets(run)[s, m] == best % 3


def test_purity_is_one_for_clean_experts_and_a_share_for_mixed_ones():
    loads_SMC = torch.tensor([[[9, 0], [0, 4], [7, 0]], [[5, 5], [5, 5], [0, 0]], [[3, 1], [2, 4], [0, 0]]])
    torch.testing.assert_close(purity(loads_SMC), torch.tensor([1.0, 0.5, 0.7]))


def test_rounds_at_home_are_those_heard_by_the_clusters_own_set():
    loads_SMC = torch.tensor([[[6, 1], [2, 3], [0, 8]]])
    torch.testing.assert_close(at_home(loads_SMC, torch.tensor([[0, 1, 1]])), torch.tensor([17 / 20]))


def test_evenness_is_the_relative_entropy_inside_sets_of_several_experts():
    # Cluster 0 owns experts 0 to 2, cluster 1 owns expert 3 alone; rounds away from home do not count.
    loads_SMC = torch.tensor(
        [[[4, 9], [4, 0], [4, 1], [7, 5]], [[6, 0], [0, 0], [0, 0], [0, 1]], [[6, 0], [3, 0], [0, 3], [0, 1]]]
    )
    sets_SM = torch.tensor([[0, 0, 0, 1]]).expand(3, 4)
    two_to_one = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    torch.testing.assert_close(evenness(loads_SMC, sets_SM), torch.tensor([1.0, 0.0, two_to_one]).double())


def test_evenness_is_unknown_where_no_set_has_several_experts():
    loads_SMC = torch.tensor([[[3, 0], [0, 2]]])
    assert evenness(loads_SMC, torch.tensor([[0, 1]])).isnan().all()
