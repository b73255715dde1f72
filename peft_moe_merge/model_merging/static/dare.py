"""DARE: changes dropped at random."""

from __future__ import annotations

import torch
from peft.utils import merge_utils
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge
from .task_arithmetic import weighted_changes


@static_merge("dare", "arXiv 2311.03099")
def dare(
    base: nn.Module, vectors: TaskVectors, scaling: float = 0.3, density: float = 0.2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """DARE (arXiv 2311.03099): drop changes at random, rescale those that stay, then task arithmetic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            name: vectors.base[name] + merge_utils.dare_linear(deltas, weights, density)
            for name, deltas, weights in weighted_changes(vectors, scaling)
        }
