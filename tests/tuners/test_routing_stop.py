import pytest
import torch

from peft_moe_merge.tuners.moe_lora_merge.routing_stop import gate_gap_flags, update_flags

SCORES = torch.tensor([0.10, 0.14, 0.50, -0.30])


def test_lt_flags_the_winner_and_what_is_tied_with_it():
    assert gate_gap_flags(SCORES, torch.tensor([0]), 0.05).tolist() == [True, True, False, False]


def test_gt_flags_what_the_winner_leaves_behind():
    assert gate_gap_flags(SCORES, torch.tensor([0]), 0.05, "gt").tolist() == [False, False, True, True]


def test_distance_is_to_the_nearest_of_several_selected_experts():
    selected_K = torch.tensor([2, 3])
    expected = [min(abs(s - 0.50), abs(s + 0.30)) < 0.37 for s in SCORES.tolist()]
    assert gate_gap_flags(SCORES, selected_K, 0.37).tolist() == expected == [False, True, True, True]


def test_leading_dimensions_are_independent_decisions():
    scores = torch.stack([SCORES, SCORES.flip(0)])
    selected = torch.tensor([[0], [0]])
    flags = gate_gap_flags(scores, selected, 0.05)
    assert flags.tolist() == [[True, True, False, False], [True, False, False, False]]


def test_nothing_is_flagged_during_exploration_and_flags_stay_afterwards():
    flags = torch.zeros(4, dtype=torch.bool)
    for step, winner, expected in (
        (1, 0, [False] * 4),
        (2, 0, [False] * 4),
        (3, 0, [True, True, False, False]),
        (4, 2, [True, True, True, False]),
        (5, 3, [True, True, True, True]),
    ):
        flags = update_flags(flags, SCORES, torch.tensor([winner]), step=step, explore=2, gap=0.05)
        assert flags.tolist() == expected, step


def test_an_unknown_rule_is_named():
    with pytest.raises(ValueError, match=r"'le'.*'lt', 'gt'"):
        gate_gap_flags(SCORES, torch.tensor([0]), 0.05, "le")
