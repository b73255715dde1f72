"""When experts merge and freeze. What then happens is the model's business."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import nn

from peft_moe_merge.tuners.moe_lora_merge.pool import Merge

from .base import TaskCallback, unwrap


class ExpertMergeCallback(TaskCallback):
    """Merges experts every so many optimizer steps, and freezes a task's favourites when its training ends.

    Args:
        merge_every: optimizer steps between merges, the merging cycle M; None never merges.
        freeze_top_k: how many of a task's most selected experts freeze, per block, when the task ends; 0 freezes none.
        optimizer_state: what the optimizer knows of an overwritten expert: "reset" forgets it, "keep" does not.

    Attributes:
        steps: optimizer steps since the task began.
        merges: what merged since then, `(steps, {block: Merge})`.

    Raises:
        ValueError: for values that make no sense.
    """

    def __init__(
        self,
        merge_every: int | None = 100,
        freeze_top_k: int = 2,
        optimizer_state: Literal["reset", "keep"] = "reset",
    ):
        if merge_every is not None and merge_every < 1:
            raise ValueError(f"`merge_every` counts optimizer steps, at least 1, or is None; got {merge_every}.")
        if freeze_top_k < 0:
            raise ValueError(f"`freeze_top_k` must not be negative, got {freeze_top_k}.")
        if optimizer_state not in ("reset", "keep"):
            raise ValueError(f"`optimizer_state` must be 'reset' or 'keep', got {optimizer_state!r}.")
        self.merge_every = merge_every
        self.freeze_top_k = freeze_top_k
        self.optimizer_state = optimizer_state
        self.steps = 0
        self.merges: list[tuple[int, dict[str, Merge]]] = []
        self._warned = False

    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start counting, at zero or, when a task is resumed, where it left off; the model then brings its counts along."""
        model = unwrap(model)
        self.steps = steps
        self.merges = []
        if steps == 0:
            model.reset_expert_usage()
        model.set_landmark()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Merge when it is time. A step that a gradient scaler skipped did not happen: it counts nothing."""
        model = unwrap(model)
        if getattr(optimizer, "step_was_skipped", False):
            model.forget_unshared_usage()
            return
        self.steps += 1
        if self.merge_every is None or self.steps % self.merge_every:
            model.share_expert_usage()
            return
        merges = model.merge_experts(optimizer if self.optimizer_state == "reset" else None)
        model.set_landmark()
        self.merges.append((self.steps, merges))
        unmerged = len(model.frozen_experts()) - len(merges)
        if unmerged and not self._warned:
            self._warned = True
            warnings.warn(
                f"{unmerged} of {unmerged + len(merges)} blocks had no merge at step {self.steps}: their experts were "
                "not selected, are fewer than three, or are all frozen. With `num_experts` too small for the number of "
                "tasks, late tasks have nothing left to train.",
                stacklevel=2,
            )

    def end_task(self, model: nn.Module) -> None:
        """Freeze the task's favourites."""
        unwrap(model).freeze_experts(self.freeze_top_k)
