"""Consensus merging: only weights that several tasks need keep their change."""

from __future__ import annotations

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import TaskVectors

from .registry import static_merge


@static_merge("consensus", "arXiv 2405.07813")
def consensus(
    base: nn.Module, vectors: TaskVectors, scaling: float = 0.3, agreement: float = 0.4, tasks: int = 2
) -> dict[str, torch.Tensor]:
    """Task arithmetic without the changes that no task, or one alone, has a use for.

    A weight is of use to a task if its change there is large beside what the others add to it:
    `|τ_t| > agreement · |Σ τ − τ_t|` (a TALL mask).

    Args:
        base: the pretrained model.
        vectors: what changed.
        scaling: what the sum of task vectors is multiplied by.
        agreement: λ of the masks; the publication chooses it per task between 0.2 and 0.6, on validation images.
        tasks: to how many tasks a weight must be of use.

    Raises:
        ValueError: more tasks than there are, or fewer than one.
    """
    if not 1 <= tasks <= len(vectors.tasks):
        raise ValueError(
            f"consensus of tasks={tasks} among {len(vectors.tasks)} tasks; choose 1 to {len(vectors.tasks)}."
        )
    merged = {}
    for name in sorted(vectors.changed()):
        deltas = vectors.stacked(name)
        total = deltas.sum(0)
        uses = (deltas.abs() > agreement * (total - deltas).abs()).sum(0)
        merged[name] = vectors.base[name] + scaling * total * (uses >= tasks)
    return merged
