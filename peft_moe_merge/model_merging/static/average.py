"""The mean of the fine-tuned models: a model soup."""

from __future__ import annotations

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge
from .task_arithmetic import task_arithmetic


@static_merge("average", "arXiv 2203.05482")
def average(base: nn.Module, vectors: TaskVectors) -> dict[str, torch.Tensor]:
    """The mean of the fine-tuned models (model soups, arXiv 2203.05482)."""
    return task_arithmetic(base, vectors, scaling=1.0 / len(vectors.tasks))
