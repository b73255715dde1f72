"""When a task's routers stop learning. A router that never stops undoes what its experts have become, see `docs/theory.md`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_moe_merge.tuners.moe_lora_merge.routing_stop import FlagRule, update_flags

from .base import TaskCallback, unwrap


class RouterFreezeCallback(TaskCallback):
    """Stops the current task's routers, at a fixed part of its training or, block by block, by the gate-gap test.

    The test is that of arXiv 2406.16437 translated to deep routers: after `explore` steps every step flags the experts
    whose score, without noise and as the mean over the batch, is closer than `gap` to that of a selected one (rule
    "lt"; "gt": farther than); a block's router stops once all its experts are flagged. With several processes only all
    of them together stop a router.

    Args:
        at_step: stop all routers after so many optimizer steps of a task.
        at_fraction: the same as a part of the task's steps; known in a `Trainer`, else given to `begin_task`.
        explore: steps before the gate-gap test begins.
        gap: its threshold, in the unit of the scores.
        rule: its reading, "lt" or "gt".

    Attributes:
        stops: per block, the step at which its router stopped in this task.

    Raises:
        ValueError: unless exactly one of `at_step`, `at_fraction` and `gap` is given.
    """

    def __init__(
        self,
        at_step: int | None = None,
        at_fraction: float | None = None,
        *,
        explore: int = 100,
        gap: float | None = None,
        rule: FlagRule = "lt",
    ):
        if sum(value is not None for value in (at_step, at_fraction, gap)) != 1:
            raise ValueError(
                "Give exactly one of `at_step`, `at_fraction` and `gap` (the gate-gap test); got "
                f"at_step={at_step}, at_fraction={at_fraction}, gap={gap}."
            )
        if at_fraction is not None and not 0.0 <= at_fraction <= 1.0:
            raise ValueError(f"`at_fraction` is a part of the task's steps, in [0, 1]; got {at_fraction}.")
        self.at_step = at_step
        self.at_fraction = at_fraction
        self.explore = explore
        self.gap = gap
        self.rule = rule
        self.steps = 0
        self.stops: dict[str, int] = {}
        self._stop_at: int | None = at_step
        self._flags: dict[str, Tensor] = {}

    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start counting a task's steps. When one is resumed, the flags of the gate-gap test begin anew.

        Raises:
            ValueError: `at_fraction` without `total_steps`.
        """
        if self.at_fraction is not None:
            if total_steps is None:
                raise ValueError("`at_fraction` needs to know the task's steps: `begin_task(model, total_steps=...)`.")
            self._stop_at = round(self.at_fraction * total_steps)
        self.steps = steps
        self.stops, self._flags = {}, {}
        model = unwrap(model)
        if self.gap is not None:
            model.keep_routing_decisions(True)
        if self._stop_at == 0:
            self._stop(model, list(model.frozen_experts()))

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Stop what is to be stopped."""
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.steps += 1
        model = unwrap(model)
        if self._stop_at is not None and self.steps >= self._stop_at and not self.stops:
            self._stop(model, list(model.frozen_experts()))
        elif self.gap is not None and self.steps > self.explore:
            self._stop(model, self._settled(model))

    def end_task(self, model: nn.Module) -> None:
        """Forget the task."""
        if self.gap is not None:
            unwrap(model).keep_routing_decisions(False)

    def _settled(self, model: Any) -> list[str]:
        open_blocks = {
            name: decisions for name, decisions in model.routing_decisions().items() if name not in self.stops
        }
        for name, decisions in open_blocks.items():
            scores_E = decisions.scores_GE.mean(dim=0)
            selected_K = scores_E.topk(decisions.indices_GK.shape[1]).indices
            self._flags[name] = update_flags(
                self._flags.get(name, torch.zeros_like(scores_E, dtype=torch.bool)),
                scores_E,
                selected_K,
                step=self.steps,
                explore=self.explore,
                gap=self.gap,
                rule=self.rule,
            )
        settled = model.agreed([bool(self._flags[name].all()) for name in open_blocks])
        return [name for name, all_agree in zip(open_blocks, settled, strict=True) if all_agree]

    def _stop(self, model: Any, blocks: list[str]) -> None:
        if blocks:
            model.stop_routers(blocks)
            self.stops |= dict.fromkeys(blocks, self.steps)
