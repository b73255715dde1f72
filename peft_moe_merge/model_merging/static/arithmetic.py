"""Merges that need nothing but the weights. PEFT's `merge_utils` do the arithmetic, tensor by tensor."""

from __future__ import annotations

import torch
from peft.utils import merge_utils
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors


def average(base: nn.Module, vectors: TaskVectors) -> dict[str, torch.Tensor]:
    """The mean of the fine-tuned models (model soups, arXiv 2203.05482)."""
    return task_arithmetic(base, vectors, scaling=1.0 / len(vectors.tasks))


def task_arithmetic(base: nn.Module, vectors: TaskVectors, scaling: float = 0.3) -> dict[str, torch.Tensor]:
    """Pretrained weights plus `scaling` times the sum of task vectors (arXiv 2212.04089)."""
    return {
        name: vectors.base[name] + merge_utils.task_arithmetic(deltas, weights)
        for name, deltas, weights in _changes(vectors, scaling)
    }


def ties(base: nn.Module, vectors: TaskVectors, scaling: float = 1.0, density: float = 0.2) -> dict[str, torch.Tensor]:
    """TIES (arXiv 2306.01708): trim small changes, elect a sign per weight, average those that agree with it.

    `density` is the share of each tensor that is kept; the publication trims over the whole model at once.
    """
    return {
        name: vectors.base[name] + merge_utils.ties(deltas, weights, density)
        for name, deltas, weights in _changes(vectors, scaling)
    }


def dare(
    base: nn.Module, vectors: TaskVectors, scaling: float = 0.3, density: float = 0.2, seed: int = 0
) -> dict[str, torch.Tensor]:
    """DARE (arXiv 2311.03099): drop changes at random, rescale those that stay, then task arithmetic."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            name: vectors.base[name] + merge_utils.dare_linear(deltas, weights, density)
            for name, deltas, weights in _changes(vectors, scaling)
        }


def _changes(vectors: TaskVectors, scaling: float):
    """Yield each changed parameter's name, its task vectors and their weights."""
    for name in sorted(vectors.changed()):
        deltas = [vectors.delta(task, name) for task in vectors.tasks]
        yield name, deltas, torch.full((len(deltas),), scaling, dtype=deltas[0].dtype, device=deltas[0].device)
