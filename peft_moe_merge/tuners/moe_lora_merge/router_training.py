"""What concerns the training of routers: losses on them, what they decide, and when they stop."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .context import latest_record
from .distributed import all_say
from .routers import Decisions


class RouterTraining:
    """The part of `MoELoraMergeModel` that acts on the routers of all blocks."""

    def auxiliary_loss(self) -> Tensor:
        """Return the weighted losses on the routers in this thread's latest training call, a mean over blocks and tasks.

        They are part of the loss that a call returns, and this is 0 then. Where you compute a loss from the logits, add
        this to it. It is 0 too when neither `router_balance_loss` nor `router_locality_loss` is set.

        Raises:
            RuntimeError: no router has decided anything: there was no call in training mode, or it ran without experts.
        """
        record = latest_record(self.adapters)
        if record.losses and not record.joined:
            return record.loss()
        if self._config.has_router_losses and not record.joined:
            raise RuntimeError(
                "There are no routing decisions to compute a loss from. Call `auxiliary_loss()` after a forward pass in "
                "training mode, with a task set."
            )
        return torch.zeros(())

    def set_landmark(self) -> None:
        """Measure from now on how far experts move, for `router_locality_loss`. Costs a copy of all experts."""
        if self._config.router_locality_loss:
            for bank in self.expert_banks().values():
                bank.set_landmark()

    def keep_routing_decisions(self, keep: bool) -> None:
        """Keep what is decided in training for `routing_decisions`; losses that need it keep it anyway."""
        for routers in self.router_banks().values():
            routers.keep_decisions = keep or self._config.has_router_losses

    def set_router_noise(self, factor: float) -> None:
        """Multiply the exploration noise in training by `factor` from the next call on; 0 routes without noise.

        Raises:
            ValueError: `factor` is no finite number of at least 0, or is positive where the routers were made without
                noise.
        """
        number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not number or not 0.0 <= factor < float("inf"):
            raise ValueError(f"The factor on the noise must be a finite number, at least 0; got {factor!r}.")
        if factor > 0 and not all(len(routers.noise_weight) for routers in self.router_banks().values()):
            raise ValueError(
                f"The routers were made without noise and have no parameters for it, got factor={factor!r}: make the "
                "adapter with `router_noise` above 0, then lower it by `set_router_noise`."
            )
        noisy = any(len(routers.noise_weight) for routers in self.router_banks().values())
        # the configuration is saved, and 0 there means that there are no parameters for noise; this adds nothing either
        self._change_config(router_noise=float(factor) or (sys.float_info.min if noisy else 0.0))

    def routing_decisions(self, task: str | None = None) -> dict[str, Decisions]:
        """Return, per block, what a task's router decided in this thread's latest training call, if kept.

        Args:
            task: its name; the current one by default.
        """
        index = self._config.current_index if task is None else self._task_index(task)
        return {
            name: decisions
            for name, decided in latest_record(self.adapters).decisions.items()
            for decisions in decided
            if decisions.task == index
        }

    def stop_routers(self, blocks: list[str] | None = None, task: str | None = None) -> None:
        """Train a task's router no more, the current one's by default, in the named blocks or in all; experts go on."""
        routers, index = self.router_banks(), self._task_index(task)
        for name in routers if blocks is None else blocks:
            self._of_block(routers, name).stopped[index] = True
        self._train_what_may_train()

    def agreed(self, answers: list[bool]) -> list[bool]:
        """Tell, question by question, whether all processes say yes. With several processes all of them must call."""
        return all_say(answers, next(iter(self.router_banks().values())).usage.device)

    def stopped_routers(self) -> list[str]:
        """List the blocks whose current router trains no more."""
        index = self._task_index(None)
        return [name for name, routers in self.router_banks().items() if routers.stopped[index]]
