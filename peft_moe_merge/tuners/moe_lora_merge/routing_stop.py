"""When has a router learnt enough? The gate-gap test that ends router training after a phase of exploration.

Shapes: ... any leading dimensions (layers, seeds), E experts, K experts selected by one decision.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

FlagRule = Literal["lt", "gt"]


def gate_gap_flags(scores_E: Tensor, selected_K: Tensor, gap: float, rule: FlagRule = "lt") -> Tensor:
    """Which experts does one routing decision show to be settled?

    The distance between an expert's score and the nearest selected expert's score is compared with `gap`:

    - `"lt"`, closer than `gap`: the expert is tied with the winner, hence of the same expert set. A selected expert is
      always flagged.
    - `"gt"`, farther than `gap`: the winner dominates the expert clearly. A selected expert is never flagged by its
      own decision, only by one that another expert wins.

    Both readings of the rule are in circulation, and they stop at very different times, see `docs/theory.md`. With
    `"lt"` a `gap` above every distance between scores flags everything at the first look, so the router stops when
    exploration ends.

    Args:
        scores_E: router scores before softmax and without exploration noise, `[..., E]`; for a batch, their mean.
        selected_K: indices of the selected experts, `[..., K]`.
        gap: threshold, in the unit of the scores.
        rule: `"lt"` or `"gt"`.

    Returns:
        Boolean flags `[..., E]`.

    Raises:
        ValueError: unknown `rule`.

    Source: after the early termination of gate updates in Li et al., "Theory on Mixture-of-Experts in Continual Learning",
    ICLR 2025 (arXiv 2406.16437), which selects one expert; the nearest selected expert for K > 1 is ours.
    """
    if rule not in get_args(FlagRule):
        raise ValueError(f"Unknown flag rule {rule!r}: expected one of {', '.join(map(repr, get_args(FlagRule)))}.")
    winners_K = scores_E.gather(-1, selected_K)
    distance_E = (scores_E.unsqueeze(-1) - winners_K.unsqueeze(-2)).abs().amin(-1)
    return distance_E < gap if rule == "lt" else distance_E > gap


def update_flags(
    flags_E: Tensor,
    scores_E: Tensor,
    selected_K: Tensor,
    *,
    step: int,
    explore: int,
    gap: float,
    rule: FlagRule = "lt",
) -> Tensor:
    """Accumulate `gate_gap_flags` over steps; router training is over, for good, once all flags of a router are set.

    Args:
        flags_E: the flags so far, boolean `[..., E]`, all false at the start.
        scores_E: scores of this step, see `gate_gap_flags`.
        selected_K: selected experts of this step.
        step: number of this step, from 1.
        explore: steps of exploration; nothing is flagged until they are over.
        gap: threshold, in the unit of the scores.
        rule: `"lt"` or `"gt"`.

    Returns:
        The flags including this step; stop when `.all(-1)`.
    """
    if step <= explore:
        return flags_E
    return torch.logical_or(flags_E, gate_gap_flags(scores_E, selected_K, gap, rule))
