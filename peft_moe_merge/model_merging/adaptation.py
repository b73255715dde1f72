"""How a merged model learns from a few images at test time: the settings that AdaMerging and WEMoE's routers share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from transformers import get_constant_schedule, get_cosine_schedule_with_warmup

ADAPTATION_LOSSES = ("entropy", "mutual_information", "entropy_with_prior", "cross_entropy")


@dataclass(frozen=True)
class Adaptation:
    """How long, how fast and by which loss.

    Args:
        steps: optimizer steps; each takes a batch of every task.
        loss: `"entropy"` as published, `"mutual_information"`, `"entropy_with_prior"` (routers only), which adds the mean
            squared distance of the gates from `scaling`, or `"cross_entropy"`, which needs labels in the batches. Mutual
            information and the prior resist collapse; no loss without labels helps a model whose predictions are mostly
            wrong.
        lr: Adam's learning rate.
        schedule: `"cosine"` to zero over `steps`, or `"constant"`.
        seed: of the order of images.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 1000
    loss: str = "entropy"
    lr: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = 0

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"`steps` must not be negative, got {self.steps}.")
        if self.loss not in ADAPTATION_LOSSES:
            raise ValueError(f"there is no loss {self.loss!r}; choose one of {list(ADAPTATION_LOSSES)}.")
        if not self.lr > 0:
            raise ValueError(f"`lr` must be positive, got {self.lr}.")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"there is no schedule {self.schedule!r}; choose 'cosine' or 'constant'.")

    @classmethod
    def told(cls, how: Adaptation | int | None, earlier: Mapping[str, Any], default: Adaptation) -> Adaptation:
        """Take settings as they are given today, one object, or as in earlier releases, each by its name, with a warning.

        Raises:
            ValueError: a name that is no setting.
        """
        if isinstance(how, int):
            how, earlier = None, {"steps": how, **earlier}
        if not earlier:
            return how or default
        known = [field.name for field in fields(cls)]
        if unknown := sorted(earlier.keys() - set(known)):
            raise ValueError(f"{unknown} are no settings of an adaptation; there are {known}.")
        now = ", ".join(f"{name}={value!r}" for name, value in earlier.items())
        warnings.warn(f"Give an adaptation's settings as one: `Adaptation({now})`.", FutureWarning, stacklevel=3)
        return replace(how or default, **earlier)

    def scheduler(self, optimizer: torch.optim.Adam, done: int = 0) -> torch.optim.lr_scheduler.LRScheduler:
        """Make the schedule of an optimizer that has taken so many steps."""
        for group in optimizer.param_groups:
            group["initial_lr"] = self.lr  # which a schedule that begins in the middle asks for
        if self.schedule == "constant":
            return get_constant_schedule(optimizer, last_epoch=done - 1)
        return get_cosine_schedule_with_warmup(optimizer, 0, max(1, self.steps), last_epoch=done - 1)
