"""When experts merge and freeze. What then happens is the model's business."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from peft_moe_merge.tuners.moe_lora_merge.pool import Merge

from .base import TaskCallback, check_integer, check_number, config_of, unwrap


class ExpertMergeCallback(TaskCallback):
    """Merges experts when the configuration's `merge_at` says, and freezes a task's favourites when its training ends.

    "steps": a merge every `merge_every` steps. "task_end": at a late step of the task, merges until it has `merge_to`
    experts in every block; then training goes on with these. "pool_full": none here, `add_task` merges.

    Known limit: with merge_routing="redirect" a merge leaves fewer experts to train, and `Trainer` cannot load the state of
    an optimizer made before it into the one that it makes when it resumes. Resume from a checkpoint before the merge.

    Args:
        merge_every: optimizer steps between merges, the merging cycle M; None never merges, whatever `merge_at` is.
        freeze_top_k: how many of a task's most selected experts freeze, per block, when the task ends; 0 freezes none.
            It is meant for shared experts: of reserved ones all that the task has freeze, unless it is 0.
        optimizer_state: what the optimizer knows of an overwritten expert: "reset" forgets it, "keep" does not.
        merge_after: with "task_end", the part of the task's steps after which to merge; the steps are known in a
            `Trainer`, else given to `begin_task`.
        merge_to: with "task_end", how many distinct experts per block the task keeps.

    Attributes:
        merges: what merged since the task began, `(steps, {block: Merge})`.

    Raises:
        ValueError: for values that make no sense.
    """

    def __init__(
        self,
        merge_every: int | None = 100,
        freeze_top_k: int = 2,
        optimizer_state: Literal["reset", "keep"] = "reset",
        *,
        merge_after: float = 0.8,
        merge_to: int = 1,
    ):
        super().__init__()
        if merge_every is not None:
            check_integer("merge_every", merge_every, 1)  # None is allowed too
        check_integer("freeze_top_k", freeze_top_k, 0)
        check_integer("merge_to", merge_to, 1)
        check_number("merge_after", merge_after, 0, 1)
        if optimizer_state not in ("reset", "keep"):
            raise ValueError(f"`optimizer_state` must be 'reset' or 'keep', got {optimizer_state!r}.")
        self.merge_every = merge_every
        self.freeze_top_k = freeze_top_k
        self.optimizer_state = optimizer_state
        self.merge_after = merge_after
        self.merge_to = merge_to
        self.merges: list[tuple[int, dict[str, Merge]]] = []
        self._merge_at_step: int | None = None
        self._warned = False

    @property
    def arguments(self) -> dict[str, Any]:
        names = ("merge_every", "freeze_top_k", "optimizer_state", "merge_after", "merge_to")
        return {name: getattr(self, name) for name in names}

    @property
    def progress(self) -> dict[str, Any]:
        merges = [[step, {block: list(merge) for block, merge in merged.items()}] for step, merged in self.merges]
        return {"task": self.task, "steps": self.steps, "merges": merges}

    @progress.setter
    def progress(self, progress: dict[str, Any]) -> None:
        self._take_up(progress)
        self.merges = [
            (step, {block: Merge(*merge) for block, merge in merged.items()}) for step, merged in progress["merges"]
        ]

    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start counting, at zero or, when a task is resumed, where it left off; the model then brings its counts along.

        Raises:
            ValueError: no task is set; merge_at="task_end" without `total_steps` or without merge_routing="redirect".
        """
        model, goes_on = self._begin(model, steps)
        self._merge_at_step = None
        config = config_of(model)
        if config.merge_at == "task_end" and self.merge_every is not None:
            if total_steps is None:
                raise ValueError(
                    "merge_at='task_end' needs to know the task's steps, got total_steps=None: "
                    "`begin_task(model, total_steps=...)`."
                )
            if config.merge_routing != "redirect":
                raise ValueError(
                    "merge_at='task_end' leaves a task fewer experts, which merge_routing="
                    f"{config.merge_routing!r} does not: use task_experts='reserved' with merge_routing='redirect'."
                )
            self._merge_at_step = max(1, round(self.merge_after * total_steps))
        if not goes_on:
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
        forgets = optimizer if self.optimizer_state == "reset" else None
        if self.steps == self._merge_at_step:
            while merges := model.merge_experts(forgets, keep=self.merge_to, task=self.task):
                self.merges.append((self.steps, merges))
            model.set_landmark()
        elif config_of(model).merge_at == "steps" and self.merge_every and self.steps % self.merge_every == 0:
            merges = model.merge_experts(forgets, task=self.task)
            model.set_landmark()
            self.merges.append((self.steps, merges))
            self._warn_of_blocks_without(len(model.frozen_experts()) - len(merges), len(merges))
        else:
            model.share_expert_usage()

    def _warn_of_blocks_without(self, unmerged: int, merged: int) -> None:
        if unmerged and not self._warned:
            self._warned = True
            warnings.warn(
                f"{unmerged} of {unmerged + merged} blocks had no merge at step {self.steps}: their experts were "
                "not selected, are fewer than three, or are all frozen. With `num_experts` too small for the number of "
                "tasks, late tasks have nothing left to train.",
                stacklevel=3,
            )

    def end_task(self, model: nn.Module) -> None:
        """Freeze the task's favourites; of reserved experts, all that it selected."""
        model, top_k = unwrap(model), self.freeze_top_k
        if top_k and config_of(model).task_experts == "reserved":
            top_k = max(len(bank) for bank in model.expert_banks().values())
        model.freeze_experts(top_k, task=self.task)
