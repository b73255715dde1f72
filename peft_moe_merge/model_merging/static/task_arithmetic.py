"""Task arithmetic: changes added up. PEFT's `merge_utils` do the arithmetic, tensor by tensor, here and in TIES and DARE."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft.utils import merge_utils
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge


@static_merge("task_arithmetic", "arXiv 2212.04089")
def task_arithmetic(base: nn.Module, vectors: TaskVectors, scaling: float = 0.3) -> dict[str, torch.Tensor]:
    """Pretrained weights plus `scaling` times the sum of task vectors."""
    return {
        name: vectors.base[name] + merge_utils.task_arithmetic(deltas, weights)
        for name, deltas, weights in weighted_changes(vectors, scaling)
    }


def weighted_changes(vectors: TaskVectors, scaling: float) -> Iterator[tuple[str, list[torch.Tensor], torch.Tensor]]:
    """Yield each changed parameter's name, its task vectors and the same weight for each, as PEFT's `merge_utils` ask."""
    for name in sorted(vectors.changed()):
        deltas = list(vectors.stacked(name))
        yield name, deltas, torch.full((len(deltas),), scaling, dtype=deltas[0].dtype, device=deltas[0].device)
