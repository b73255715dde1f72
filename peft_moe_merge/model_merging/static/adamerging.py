"""AdaMerging: task arithmetic whose coefficients are learned at test time (arXiv 2310.02575)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from peft_moe_merge.model_merging.adaptation import Adaptation
from peft_moe_merge.model_merging.batches import endless
from peft_moe_merge.model_merging.finetuned import TaskVectors
from peft_moe_merge.model_merging.logits import task_logits
from peft_moe_merge.model_merging.losses import loss_of

from .registry import static_merge

DEFAULT = Adaptation(steps=500, lr=1e-3, schedule="constant")


class _Logits(nn.Module):
    """`task_logits` as a module, for `functional_call`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch, head_CD):
        return task_logits(self.model, batch, head_CD)


@static_merge("adamerging", "arXiv 2310.02575")
def adamerging(
    base: nn.Module,
    vectors: TaskVectors,
    batches: Mapping[str, Iterable],
    heads: Mapping[str, torch.Tensor],
    scaling: float = 0.3,
    how: Adaptation | None = None,
    progress: bool = True,
    **earlier: Any,
) -> dict[str, torch.Tensor]:
    """Learn one coefficient per task and parameter ("layer-wise") that make predictions sure.

    Args:
        base: the pretrained model.
        vectors: what changed.
        batches: images of each task, run through again and again; labels are looked at only where the loss needs them.
        heads: the normalised text features of each task's classes.
        scaling: where coefficients start.
        how: steps, loss, learning rate, seed; by default 500 steps at a constant rate of 1e-3.
        progress: show a progress bar.
        **earlier: settings of `how` by their names, as earlier releases took them.

    Raises:
        ValueError: a loss that is for routers only.
    """
    how = Adaptation.told(how, earlier, DEFAULT)
    if how.loss == "entropy_with_prior":
        raise ValueError("the loss 'entropy_with_prior' is for the gates of routers, of which AdaMerging has none.")
    names = sorted(vectors.changed())
    deltas = {name: vectors.stacked(name) for name in names}
    coefficients_NT = torch.full(
        (len(names), len(vectors.tasks)), scaling, requires_grad=True, device=deltas[names[0]].device
    )
    model = _Logits(copy.deepcopy(base).eval().requires_grad_(False))
    optimizer = torch.optim.Adam([coefficients_NT], lr=how.lr)
    schedule = how.scheduler(optimizer)
    streams = {task: endless(batches[task], task, how.seed + 1009 * t) for t, task in enumerate(vectors.tasks)}

    def merged() -> dict[str, torch.Tensor]:
        return {
            name: vectors.base[name] + torch.tensordot(coefficients_T.to(deltas[name]), deltas[name], 1)
            for name, coefficients_T in zip(names, coefficients_NT, strict=True)
        }

    for _ in tqdm(range(how.steps), desc="AdaMerging", disable=not progress):
        optimizer.zero_grad()
        for task, stream in streams.items():
            parameters = {f"model.{name}": value.to(vectors.base[name]) for name, value in merged().items()}
            batch = next(stream)
            logits = torch.func.functional_call(model, parameters, (batch, heads[task]))
            loss_of(how.loss, logits, batch).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return merged()
