"""TIES: signs of changes are elected."""

from __future__ import annotations

import torch
from peft.utils import merge_utils
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge
from .task_arithmetic import weighted_changes


@static_merge("ties", "arXiv 2306.01708")
def ties(base: nn.Module, vectors: TaskVectors, scaling: float = 1.0, density: float = 0.2) -> dict[str, torch.Tensor]:
    """TIES (arXiv 2306.01708): trim small changes, elect a sign per weight, average those that agree with it.

    `density` is the share of each tensor that is kept; the publication trims over the whole model at once.
    """
    return {
        name: vectors.base[name] + merge_utils.ties(deltas, weights, density)
        for name, deltas, weights in weighted_changes(vectors, scaling)
    }
