"""Iso-C: the sum of changes, as strong in every direction that it has."""

from __future__ import annotations

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge


@static_merge("iso_c", "arXiv 2502.04959")
def iso_c(base: nn.Module, vectors: TaskVectors, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """Give the sum of task vectors of each matrix equal singular values, their mean: `W₀ + scaling · σ̄ U Vᵀ`.

    Everything that is no matrix gets `scaling` times the mean of its task vectors. The publication chooses `scaling` on
    validation images of all tasks, and finds values above 1.
    """
    merged = {}
    for name in sorted(vectors.changed()):
        deltas = vectors.stacked(name)
        change = isotropic(deltas.sum(0)) if deltas.ndim == 3 else deltas.mean(0)
        merged[name] = vectors.base[name] + scaling * change
    return merged


def isotropic(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of a matrix by their mean. Directions that it does not have stay without."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    present = values > values[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
    return values.mean() * (u * present) @ vh
