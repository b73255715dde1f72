"""Callbacks whose unit is a task: the same object for a `Trainer`, where one `train()` is one task, and for a loop of one's own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from peft_moe_merge.tuners.moe_lora_merge.config import MoELoraMergeConfig


def unwrap(model: nn.Module) -> Any:
    """Take a model with experts out of whatever wraps it for parallel training or compilation.

    Raises:
        TypeError: it has no experts.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    if not hasattr(model, "merge_experts"):
        raise TypeError(
            "This callback needs a model with experts, `get_peft_model(model, MoELoraMergeConfig(...))`; got "
            f"{type(model).__name__}."
        )
    return model


def config_of(model: Any) -> MoELoraMergeConfig:
    """Return the configuration of a model's active adapter."""
    return model.peft_config[model.active_adapters[0]]


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise a ValueError unless `value` is an integer of at least `least`; True and False are none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer, at least {least}; got {value!r}.")


def check_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> None:
    """Raise a ValueError unless `value` is a finite number from `least` to `most`; True and False are none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"`{name}` must be a finite number, {bounds}; got {value!r}.")


class TaskCallback(TrainerCallback, ExportableState, ABC):
    """Acts when a task begins, after its optimizer steps, and when it ends.

    In a `Trainer`, pass it in `callbacks`. A checkpoint keeps its state, and a run that is resumed goes on with it: the
    callback with the same arguments takes it up, whatever `restore_callback_states_from_checkpoint` says. In a loop of your own, call the same object:

    ```python
    callback.begin_task(model)
    for batch in loader:
        ...
        optimizer.step()
        callback.step(model, optimizer)
    callback.end_task(model)
    ```

    It remembers the task that was current when it began: an evaluation in between may set another.

    Attributes:
        task: the name of the task that it works for.
        steps: optimizer steps since that task began.
    """

    def __init__(self) -> None:
        self.task: str | None = None
        self.steps = 0

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the callback was made with."""

    @property
    def progress(self) -> dict[str, Any]:
        """Where it stands in its task, as values that JSON keeps. Set it to go on from there."""
        return {"task": self.task, "steps": self.steps}

    @progress.setter
    def progress(self, progress: dict[str, Any]) -> None:
        self._take_up(progress)

    def _take_up(self, progress: dict[str, Any]) -> None:
        self.task, self.steps = progress["task"], progress["steps"]

    def state(self) -> dict[str, Any]:
        """Return the arguments and the progress, as `Trainer` writes them into a checkpoint."""
        return {"args": self.arguments, "attributes": {"progress": self.progress}}

    def _begin(self, model: nn.Module, steps: int) -> tuple[Any, bool]:
        """Remember the current task.

        Returns:
            The model without its wrappers, and whether the callback goes on with a task that it knows.
        """
        model = unwrap(model)
        check_integer("steps", steps, 0)
        task = model.current_task
        if task is None:
            raise ValueError(
                f"{type(self).__name__} acts for the task that trains, but no task is set (current_task=None): call "
                "`model.set_task(name)` before training begins."
            )
        goes_on = steps > 0 and self.task == task
        self.task, self.steps = task, steps
        return model, goes_on

    @abstractmethod
    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start a task, or go on with one.

        Args:
            model: the model, also inside a wrapper for parallel training.
            steps: optimizer steps that a resumed task has behind it.
            total_steps: optimizer steps of the whole task, if known.

        Raises:
            TypeError: the model has no experts.
            ValueError: no task is set.
        """

    @abstractmethod
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Call after every optimizer step, in all processes."""

    @abstractmethod
    def end_task(self, model: nn.Module) -> None:
        """Call once when the task's training is over, in all processes."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        stored = state.stateful_callbacks.setdefault(type(self).__name__, {})
        if state.global_step > 0:
            for candidate in stored if isinstance(stored, list) else [stored]:
                if candidate.get("args") == self.arguments:  # of several alike, the last is the newest
                    self.progress = candidate["attributes"]["progress"]
        self.begin_task(model, steps=state.global_step, total_steps=state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        self.step(model, optimizer)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        self.end_task(model)
