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
class Routed:
    """Which rows of a batch are routed, and by which tasks' routers. Rows not named here no expert may touch.

    Attributes:
        tasks: the T distinct tasks, ascending.
        rows_N: the rows that are routed; None when all are.
        position_N: for each of these rows, the position of its task in `tasks`; None when there is one task.
    """

    tasks: tuple[int, ...]
    rows_N: Tensor | None = None
    position_N: Tensor | None = None

    def one_of_each(self) -> Tensor:
        """Return, for each task, the first of the N rows that is its own."""
        tasks_T1 = torch.arange(len(self.tasks), device=self.position_N.device).unsqueeze(1)
        return (self.position_N == tasks_T1).int().argmax(dim=1)

    def tokens(self, length: int) -> Routed:
        """The same for a batch in which each row is one of `length` tokens of a row here."""
        rows_N, position_N = self.rows_N, self.position_N
        if rows_N is not None:
            rows_N = (rows_N.unsqueeze(1) * length + torch.arange(length, device=rows_N.device)).flatten()
        if position_N is not None:
            position_N = position_N.repeat_interleave(length)
        return Routed(self.tasks, rows_N, position_N)


@dataclass(frozen=True)
class TaskIds:
    """The tasks of one batch, sorted out once per forward pass so that no layer has to wait for the device.

    Attributes:
        size: B.
        present: the distinct ids, ascending, `PLAIN` among them if it occurs.
        slot_B: for each sample, the position of its id in `present`.
        routed: the rows with a real task; None when there are none.
    """

    size: int
    present: tuple[int, ...]
    slot_B: Tensor
    routed: Routed | None

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
        tasks = tuple(task for task in present if task != PLAIN)
        plain = len(present) - len(tasks)  # 1 if there are plain samples; their slot is the first then
        rows_N = (slot_B >= plain).nonzero().squeeze(1) if plain else None
        slot_N = slot_B if rows_N is None else slot_B[rows_N]
        routed = Routed(tasks, rows_N, slot_N - plain if len(tasks) > 1 else None) if tasks else None
        return cls(len(task_ids), present, slot_B, routed)

    def all_of(self, slot: int, size: int) -> TaskIds:
        """The ids of a batch of `size` samples that all have the task at `slot` of `present`."""
        task = self.present[slot]
        routed = None if task == PLAIN else Routed((task,))
        return TaskIds(size, (task,), self.slot_B.new_zeros(size), routed)


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

    def routed(self, adapter_name: str, batch: int, *, prompts: bool) -> Routed | None:
        """Say which rows of a batch belong to which task's router; None when no row does."""
        ids = self.prompt_ids if prompts and self.prompt_ids is not None else self.ids
        if ids is None:
            task = self.current[adapter_name]
            return None if task is None else Routed((task,))
        if ids.size != batch:
            raise ValueError(
                f"`task_ids` has {ids.size} entries but an adapted module sees a batch of {batch}: pass one id per "
                "sample. (A module whose input folds other dimensions into the batch can't be routed by sample.)"
            )
        return ids.routed

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
