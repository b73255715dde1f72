"""Which task routes which sample in the forward pass under way: one object, shared by all layers of a model.

Shapes: B samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

PLAIN = -1
"""The task id of samples that no expert may touch."""


@dataclass(frozen=True)
class TaskIds:
    """The tasks of one batch, sorted out once per forward pass so that no layer has to wait for the device.

    Attributes:
        size: B.
        present: the distinct ids, ascending, `PLAIN` among them if it occurs.
        slot_B: for each sample, the position of its id in `present`.
        groups: for each real task that occurs, the rows of its samples; the rows are None when it has all of them.
    """

    size: int
    present: tuple[int, ...]
    slot_B: Tensor
    groups: tuple[tuple[int, Tensor | None], ...]

    @classmethod
    def check(cls, task_ids: Tensor, tasks: list[str]) -> TaskIds:
        """Validate `task_ids` (integers, shape B, each -1 or the index of one of `tasks`) and sort them out.

        Raises:
            TypeError: `task_ids` is not a tensor of integers.
            ValueError: it has the wrong shape, or an id without a router.
        """
        if not isinstance(task_ids, Tensor) or task_ids.dtype.is_floating_point or task_ids.dtype == torch.bool:
            kind = task_ids.dtype if isinstance(task_ids, Tensor) else type(task_ids).__name__
            raise TypeError(f"`task_ids` must be a LongTensor with one task index per sample, got {kind}.")
        if task_ids.ndim != 1 or not len(task_ids):
            raise ValueError(f"`task_ids` must have shape (batch,), got {tuple(task_ids.shape)}.")
        present, slot_B = task_ids.unique(return_inverse=True)
        present = tuple(present.tolist())
        if present[0] < PLAIN or present[-1] >= len(tasks):
            wrong = [task for task in present if not PLAIN <= task < len(tasks)]
            raise ValueError(
                f"`task_ids` holds {wrong}, but the adapter has {len(tasks)} tasks: "
                f"{dict(enumerate(tasks))}. Use those indexes, or -1 for the model without experts."
            )
        groups = tuple(
            (task, None if len(present) == 1 else (slot_B == slot).nonzero().squeeze(1))
            for slot, task in enumerate(present)
            if task != PLAIN
        )
        return cls(len(task_ids), present, slot_B, groups)


@dataclass
class TaskState:
    """What the layers of one model ask before they route.

    Attributes:
        current: adapter name -> index of its current task, or None for the model without experts.
        ids: the tasks of this forward pass's samples, when given one by one.
        prompt_ids: the same for the text tower, when both towers run and the prompts are not the samples.
        prompts_start_alike: this forward pass's prompts all begin with the same token.
    """

    current: dict[str, int | None] = field(default_factory=dict)
    ids: TaskIds | None = None
    prompt_ids: TaskIds | None = None
    prompts_start_alike: bool = False

    def groups(self, adapter_name: str, batch: int, *, prompts: bool) -> tuple[tuple[int, Tensor | None], ...]:
        """Say which rows of a batch belong to which task's router; rows None means all, rows not named are plain."""
        ids = self.prompt_ids if prompts and self.prompt_ids is not None else self.ids
        if ids is None:
            task = self.current[adapter_name]
            return () if task is None else ((task, None),)
        if ids.size != batch:
            raise ValueError(
                f"`task_ids` has {ids.size} entries but an adapted module sees a batch of {batch}: pass one id per "
                "sample. (A module whose input folds other dimensions into the batch can't be routed by sample.)"
            )
        return ids.groups

    @contextmanager
    def during(self, **values: Any) -> Iterator[None]:
        """Set attributes for the time of a block."""
        before = {name: getattr(self, name) for name in values}
        self.__dict__.update(values)
        try:
            yield
        finally:
            self.__dict__.update(before)


class CarryTasks:
    """Wraps a gradient checkpointing function so that a recomputation routes as its forward pass did.

    The recomputation happens in the backward pass, when the state may already belong to another batch or task.
    """

    def __init__(self, checkpoint: Callable, state: TaskState):
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        then = replace(self.state, current=dict(self.state.current))

        def function_as_then(*inputs: Any, **named: Any) -> Any:
            with self.state.during(**vars(then)):
                return function(*inputs, **named)

        return self.checkpoint(function_as_then, *args, **kwargs)
