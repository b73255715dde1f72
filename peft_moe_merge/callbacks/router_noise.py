"""How a task's routing calms down: noise explores while the experts are new, and disturbs once they have learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import TaskCallback, check_number, unwrap


class RouterNoiseCallback(TaskCallback):
    """Anneals the factor on the routers' exploration noise, linearly over the first part of each task.

    Args:
        start: the factor when a task begins.
        end: the factor from the end of that part on; it stays when the task is over.
        share: the part of the task's steps that it takes; the steps are known in a `Trainer`, else given to
            `begin_task`. 0 begins with `end`.

    Raises:
        ValueError: for values that make no sense.
    """

    def __init__(self, start: float = 1.0, end: float = 0.0, share: float = 0.5):
        super().__init__()
        check_number("start", start)
        check_number("end", end)
        check_number("share", share, 0, 1)
        self.start = start
        self.end = end
        self.share = share
        self._annealed_at = 0.0

    @property
    def arguments(self) -> dict[str, Any]:
        return {"start": self.start, "end": self.end, "share": self.share}

    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Set the factor for a task's first step, or for that with which a resumed one goes on.

        Raises:
            ValueError: no `total_steps`; no task is set; the routers were made without noise.
        """
        if total_steps is None:
            raise ValueError(
                "Annealing needs to know the task's steps, got total_steps=None: `begin_task(model, total_steps=...)`."
            )
        model, _ = self._begin(model, steps)
        self._annealed_at = self.share * total_steps
        model.set_router_noise(self._factor())

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Set the factor for the next step."""
        if getattr(optimizer, "step_was_skipped", False):
            return
        self.steps += 1
        unwrap(model).set_router_noise(self._factor())

    def end_task(self, model: nn.Module) -> None:
        """Nothing: the factor stays."""

    def _factor(self) -> float:
        done = min(1.0, self.steps / self._annealed_at) if self._annealed_at else 1.0
        return self.start * (1 - done) + self.end * done
