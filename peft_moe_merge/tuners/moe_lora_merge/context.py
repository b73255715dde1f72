"""Which task routes which sample in the call under way. It reaches the layers without being kept on any module.

Shapes: B samples, N rows that are routed, T tasks.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .config import MoELoraMergeConfig
    from .routers import Decisions

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
    """The tasks of one batch, sorted out once per call so that no layer has to wait for the device.

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


class Adapters:
    """What all layers of one tuner share: the configurations of its adapters, each the one owner of its settings and of
    its current task. A configuration is never changed, but replaced by another when a setting changes.

    Args:
        configs: by adapter name; the tuner's own dictionary.
        tuner: whose they are; kept weakly. None where it is not known, as in a copy.
    """

    def __init__(self, configs: dict[str, MoELoraMergeConfig], tuner: nn.Module | None = None):
        self.configs = configs
        self._tuner = None if tuner is None else weakref.ref(tuner)

    @property
    def abandoned(self) -> bool:
        """Whether the tuner is gone, so that nobody can ask anything of its layers."""
        return self._tuner is not None and self._tuner() is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        return Adapters(copy.deepcopy(self.configs, memo))

    def __reduce__(self) -> tuple:
        return Adapters, (self.configs,)


@dataclass
class Record:
    """What the routers of one training call decided, for losses and for the stop rule.

    Attributes:
        decisions: per block, one entry per task in the batch.
        losses: of the routers, weighted, one per block and task.
        joined: the losses are part of the loss that the call returned.
    """

    decisions: dict[str, list[Decisions]] = field(default_factory=dict)
    losses: list[Tensor] = field(default_factory=list)
    joined: bool = False

    def loss(self) -> Tensor:
        """Return the mean of the losses, of which there must be some."""
        return torch.stack([loss.to(self.losses[0].device) for loss in self.losses]).mean()


@dataclass(frozen=True)
class RoutingContext:
    """What was decided for one call, before it began; layers ask it which rows they route.

    Attributes:
        adapters: whose layers it is for; those of another tuner in the same call do not listen to it.
        current: adapter name -> index of the task that routes samples without an id; None for no task.
        ids: the tasks of this call's samples, when given one by one.
        prompt_ids: the same for the text tower, when both towers run and the prompts are not the samples.
        prompts_start_alike: the prompts all begin with the same token.
        record: what is decided in this call, where it is of interest.
    """

    adapters: Adapters
    current: Mapping[str, int | None]
    ids: TaskIds | None = None
    prompt_ids: TaskIds | None = None
    prompts_start_alike: bool = False
    record: Record | None = None

    @classmethod
    def of_current_tasks(cls, adapters: Adapters) -> RoutingContext:
        """Let each adapter's current task route everything."""
        return cls(adapters, {name: config.current_index for name, config in list(adapters.configs.items())})

    def routed(self, adapter_name: str, batch: int, *, prompts: bool) -> Routed | None:
        """Say which rows of a batch belong to which task's router; None when no row does.

        Raises:
            ValueError: there are ids for another number of rows.
        """
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


class _Thread(threading.local):
    """What is under way in a thread. Every thread has its own.

    Not a `contextvars.ContextVar`, which `torch.compile` can't set inside a graph. A recomputation in the backward pass,
    perhaps in another thread, gets its context handed, see `RoutedBlock`.
    """

    context: RoutingContext | None = None
    residual: Tensor | None = None
    gates: tuple[Adapters, dict[str, list[Tensor]]] | None = None

    def __init__(self):
        self.records: weakref.WeakKeyDictionary[Adapters, Record] = weakref.WeakKeyDictionary()


_thread = _Thread()


def context_of(adapters: Adapters) -> RoutingContext:
    """Return the context of the call under way, or that of the current tasks where the layers are called by themselves."""
    context = _thread.context
    if context is None or context.adapters is not adapters:
        return RoutingContext.of_current_tasks(adapters)
    return context


def context_under_way() -> RoutingContext | None:
    """Return the context of the call under way in this thread, whoever's it is."""
    return _thread.context


@contextmanager
def routing(context: RoutingContext | None) -> Iterator[None]:
    """Route by this context inside the block."""
    before = _thread.context
    _thread.context = context
    try:
        yield
    finally:
        _thread.context = before


@contextmanager
def recorded_gates(adapters: Adapters) -> Iterator[dict[str, list[Tensor]]]:
    """Collect, inside the block, the gates of this thread's calls, see `MoELoraMergeModel.recorded_gates`."""
    before, gates = _thread.gates, {}
    _thread.gates = (adapters, gates)
    try:
        yield gates
    finally:
        _thread.gates = before


def gates_asked_for(adapters: Adapters) -> dict[str, list[Tensor]] | None:
    """Return where this thread collects gates of these adapters' layers; None where nobody asks."""
    return _thread.gates[1] if _thread.gates is not None and _thread.gates[0] is adapters else None


def remember_residual(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Forward pre-hook of the layer norm before an MLP: the experts beside the MLP, which runs next, read its input."""
    _thread.residual = args[0]


def residual_of(normalized: Tensor) -> Tensor:
    """Return the input of the layer norm that has just run in this thread.

    Args:
        normalized: what came out of it.

    Raises:
        RuntimeError: none has run since the last time.
    """
    residual = _thread.residual
    if residual is None or residual.shape != normalized.shape:
        raise RuntimeError(
            "The experts beside this MLP read the input of the layer norm before it, which has not run right before. Call "
            "the whole block, or use expert_input='normalized'."
        )
    return residual


def forget_residual() -> None:
    """Drop what `remember_residual` keeps, once the MLP has run."""
    _thread.residual = None


def keep_record(context: RoutingContext) -> None:
    """Keep what was decided in a call for who asks after it, in this thread, until the next call."""
    if context.record is not None:
        _thread.records[context.adapters] = context.record


def latest_record(adapters: Adapters) -> Record:
    """Return what was decided in this thread's latest training call."""
    return _thread.records.get(adapters, Record())
