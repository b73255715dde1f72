"""Callbacks whose unit is a task: the same object for a `Trainer`, where one `train()` is one task, and for a loop of one's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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


class TaskCallback(TrainerCallback, ABC):
    """Acts when a task begins, after its optimizer steps, and when it ends.

    In a `Trainer`, pass it in `callbacks`. In a loop of your own, call the same object:

    ```python
    callback.begin_task(model)
    for batch in loader:
        ...
        optimizer.step()
        callback.step(model, optimizer)
    callback.end_task(model)
    ```
    """

    @abstractmethod
    def begin_task(self, model: nn.Module, *, steps: int = 0, total_steps: int | None = None) -> None:
        """Start a task, or go on with one.

        Args:
            model: the model, also inside a wrapper for parallel training.
            steps: optimizer steps that a resumed task has behind it.
            total_steps: optimizer steps of the whole task, if known.

        Raises:
            TypeError: the model has no experts.
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
