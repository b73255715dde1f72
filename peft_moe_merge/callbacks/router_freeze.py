"""When a task's routers stop learning. A router that never stops undoes what its experts have become, see `docs/theory.md`."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor, nn

from peft_moe_merge.tuners.moe_lora_merge.routing_stop import FlagRule, update_flags

from .base import TaskCallback, check_integer, check_number, unwrap


class RouterFreezeCallback(TaskCallback):
    """Stops the current task's routers, at a fixed part of its training or, block by block, by the gate-gap test.

    The test is that of arXiv 2406.16437 translated to deep routers: after `explore` steps every step flags the experts
    whose score, without noise and as the mean over the batch, is closer than `gap` to that of a selected one (rule
    "lt"; "gt": farther than); a block's router stops once all its experts are flagged. With several processes only all
    of them together stop a router.

    Known limit: an optimizer holds what trains when it is made. `Trainer` makes a new one when it resumes, and cannot load
    into it the state of one that was made before routers stopped. Resume from a checkpoint before the stop.

    Args:
        at_step: stop all routers after so many optimizer steps of a task.
        at_fraction: the same as a part of the task's steps; known in a `Trainer`, else given to `begin_task`.
        explore: steps before the gate-gap test begins.
        gap: its threshold, in the unit of the scores.
        rule: its reading, "lt" or "gt".

    Attributes:
        stops: per block, the step at which its router stopped in this task.

    Raises:
        ValueError: unless exactly one of `at_step`, `at_fraction` and `gap` is given; for values that make no sense.
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
        super().__init__()
        if sum(value is not None for value in (at_step, at_fraction, gap)) != 1:
            raise ValueError(
                "Give exactly one of `at_step`, `at_fraction` and `gap` (the gate-gap test); got "
                f"at_step={at_step}, at_fraction={at_fraction}, gap={gap}."
            )
        if at_step is not None:
            check_integer("at_step", at_step, 0)
        if at_fraction is not None:
            check_number("at_fraction", at_fraction, 0, 1)
        if gap is not None:
            check_number("gap", gap)
            if gap == 0:
                raise ValueError(
                    "`gap` is a distance between scores, above 0; got 0: a gate gap of 0 settles nothing."
                )
        check_integer("explore", explore, 0)
        if rule not in get_args(FlagRule):
            raise ValueError(f"`rule` must be one of {', '.join(map(repr, get_args(FlagRule)))}; got {rule!r}.")
        self.at_step = at_step
        self.at_fraction = at_fraction
        self.explore = explore
        self.gap = gap
        self.rule = rule
        self.stops: dict[str, int] = {}
        self._stop_at: int | None = at_step
        self._flags: dict[str, Tensor] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("at_step", "at_fraction", "explore", "gap", "rule")}

    @property
    def progress(self) -> dict[str, Any]:
        flags = {block: flags_E.tolist() for block, flags_E in self._flags.items()}
        return {"task": self.task, "steps": self.steps, "stops": dict(self.stops), "flags": flags}

    @progress.setter
    def progress(self, progress: dict[str, Any]) -> None:
        self._take_up(progress)
        self.stops = dict(progress["stops"])
        self._flags = {block: torch.tensor(flags) for block, flags in progress["flags"].items()}

    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start counting a task's steps, or go on with one.

        Raises:
            ValueError: `at_fraction` without `total_steps`; no task is set.
        """
        if self.at_fraction is not None:
            if total_steps is None:
                raise ValueError("`at_fraction` needs to know the task's steps: `begin_task(model, total_steps=...)`.")
            self._stop_at = round(self.at_fraction * total_steps)
        model, goes_on = self._begin(model, steps)
        if not goes_on:
            self.stops, self._flags = {}, {}
        if self.gap is not None:
            model.keep_routing_decisions(True)
        if self._stop_at == 0 and not self.stops:
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
            name: decisions for name, decisions in model.routing_decisions(self.task).items() if name not in self.stops
        }
        for name, decisions in open_blocks.items():
            scores_E = decisions.scores_GE.mean(dim=0)
            selected_K = scores_E.topk(decisions.indices_GK.shape[1]).indices
            self._flags[name] = update_flags(
                self._flags.get(name, torch.zeros_like(scores_E, dtype=torch.bool)).to(scores_E.device),
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
            model.stop_routers(blocks, task=self.task)
            self.stops |= dict.fromkeys(blocks, self.steps)
