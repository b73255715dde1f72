"""TSV-merge: each task keeps its strongest directions, and all of them are made orthogonal."""

from __future__ import annotations

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors
from peft_moe_merge.model_merging.orthogonal import orthogonal

from .registry import static_merge


@static_merge("tsv", "arXiv 2412.00081")
def tsv(base: nn.Module, vectors: TaskVectors, scaling: float = 1.0) -> dict[str, torch.Tensor]:
    """Pretrained weights plus `scaling` times the sum of the tasks' orthogonal parts, see [`OrthogonalTaskVectors`]."""
    parts = orthogonal(vectors)
    return {name: vectors.base[name] + scaling * parts.summed(name) for name in sorted(vectors.changed())}
