"""TSV-merge: each task keeps its strongest directions, and all of them are made orthogonal."""

from __future__ import annotations

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge


@static_merge("tsv", "arXiv 2412.00081")
def tsv(base: nn.Module, vectors: TaskVectors, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """Merge matrices by their tasks' singular vectors, which share the room: each of T tasks gets a T-th of the rank.

    The kept left vectors of all tasks stand side by side and are replaced by the nearest orthonormal ones (Procrustes),
    so are the right ones; between them stand all the kept singular values. Everything that is no matrix gets `scaling`
    times the mean of its task vectors.
    """
    merged = {}
    for name in sorted(vectors.changed()):
        deltas = vectors.stacked(name)
        change = without_interference(deltas) if deltas.ndim == 3 else deltas.mean(0)
        merged[name] = vectors.base[name] + scaling * change
    return merged


def without_interference(deltas_TOI: torch.Tensor) -> torch.Tensor:
    """Return the merged change of a matrix, see `tsv`."""
    kept = max(1, min(deltas_TOI.shape[1:]) // len(deltas_TOI))
    u, values, vh = torch.linalg.svd(deltas_TOI, full_matrices=False)
    left = nearest_orthonormal(torch.cat(list(u[..., :kept]), dim=1))
    right = nearest_orthonormal(torch.cat(list(vh[:, :kept].mT), dim=1))
    return left * values[:, :kept].flatten() @ right.mT


def nearest_orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Return the matrix with orthonormal columns (rows, if there are more columns) that is nearest to the given one."""
    p, _, qh = torch.linalg.svd(columns, full_matrices=False)
    return p @ qh
