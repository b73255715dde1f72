"""AdaMerging: task arithmetic whose coefficients are learned at test time (arXiv 2310.02575)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from tqdm import tqdm

from peft_moe_merge.model_merging.batches import endless
from peft_moe_merge.model_merging.finetuned import TaskVectors
from peft_moe_merge.model_merging.logits import task_logits
from peft_moe_merge.model_merging.losses import LOSSES

from .registry import static_merge


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
    steps: int = 500,
    lr: float = 1e-3,
    loss: str = "entropy",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Learn one coefficient per task and parameter ("layer-wise") that make predictions sure.

    Args:
        base: the pretrained model.
        vectors: what changed.
        batches: unlabelled images of each task, run through again and again.
        heads: the normalised text features of each task's classes.
        scaling: where coefficients start.
        steps: of Adam; one batch of every task a step.
        lr: Adam's learning rate.
        loss: `"entropy"` as published, or `"mutual_information"`, which resists collapse.
        seed: of the order of images.
        progress: show a progress bar.
    """
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss!r} for AdaMerging; choose one of {list(LOSSES)}.")
    names = sorted(vectors.changed())
    deltas = {name: vectors.stacked(name) for name in names}
    coefficients_NT = torch.full(
        (len(names), len(vectors.tasks)), scaling, requires_grad=True, device=deltas[names[0]].device
    )
    model = _Logits(copy.deepcopy(base).eval().requires_grad_(False))
    optimizer = torch.optim.Adam([coefficients_NT], lr=lr)
    streams = {task: endless(batches[task], task, seed + 1009 * t) for t, task in enumerate(vectors.tasks)}

    def merged() -> dict[str, torch.Tensor]:
        return {
            name: vectors.base[name] + torch.tensordot(coefficients_T.to(deltas[name]), deltas[name], 1)
            for name, coefficients_T in zip(names, coefficients_NT, strict=True)
        }

    for _ in tqdm(range(steps), desc="AdaMerging", disable=not progress):
        optimizer.zero_grad()
        for task, stream in streams.items():
            parameters = {f"model.{name}": value.to(vectors.base[name]) for name, value in merged().items()}
            logits = torch.func.functional_call(model, parameters, (next(stream), heads[task]))
            LOSSES[loss](logits.float()).backward()
        optimizer.step()
    with torch.no_grad():
        return merged()
