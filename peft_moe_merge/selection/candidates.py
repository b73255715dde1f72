"""The classes asked about are evidence: which tasks may route an image that is one of these.

Shapes: C candidates, K classes of a task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

OVERLAP = 0.5
"""Share of the smaller of two lists, a task's classes and the candidates, that both must have in common."""


@dataclass(frozen=True)
class Candidates:
    """What candidate classes tell about the task of an image.

    Attributes:
        allowed: ids of the tasks that may route it.
        complete: whether every candidate is a class of an allowed task, so that no image can be of none of them.
        shared: of each allowed task the candidates, by position, that are its classes.
    """

    allowed: tuple[int, ...]
    complete: bool
    shared: tuple[frozenset[int], ...] = field(default=(), compare=False)

    def ruled_out(self, task: int) -> frozenset[int]:
        """Return the candidates that an image of a task can't be: classes of other allowed tasks and not of this one."""
        known = dict(zip(self.allowed, self.shared, strict=True))
        return frozenset().union(*self.shared) - known[task]


def same_name(name: str) -> str:
    """Return what equal class names have in common: case, underscores and spaces at the ends do not matter."""
    return " ".join(name.replace("_", " ").split()).casefold()


def check_candidates(candidates: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple.

    Raises:
        ValueError: there are none, one is no name, or one is named twice.
    """
    if isinstance(candidates, str) or not len(candidates):
        raise ValueError(f"Candidates must be a list of at least one class name, got {candidates!r}.")
    for name in candidates:
        if not isinstance(name, str) or not same_name(name):
            raise ValueError(f"A class name must be a non-empty string, got {name!r}.")
    twice = sorted({name for name in candidates if list(candidates).count(name) > 1})
    if twice:
        raise ValueError(f"Classes named twice: {twice}. Name each once, or tell them apart.")
    return tuple(candidates)


def tasks_of_candidates(
    candidates: Sequence[str],
    classes: Sequence[Sequence[str]],
    cosines: Callable[[int], Tensor] | None = None,
    similarity: float = 0.95,
) -> Candidates:
    """Tell which tasks an image may be from, if its class is one of the candidates.

    Where the candidates are exactly the classes of some tasks together, these are allowed and no others. Otherwise a
    task is allowed that shares with the candidates at least half of the smaller of the two lists. Names are shared if
    they are the same, or if their text embeddings are as similar as stated.

    Args:
        candidates: class names.
        classes: those of each task.
        cosines: returns, for a task's id, the cosines C x K between text embeddings of the candidates and of its
            classes; without it only equal names count.
        similarity: cosine from which on two names mean the same.

    Raises:
        ValueError: no candidates, or duplicate ones.
    """
    wanted = [same_name(name) for name in check_candidates(candidates)]
    known = [[same_name(name) for name in of_task] for of_task in classes]
    whole = [task for task, names in enumerate(known) if set(names) <= set(wanted)]
    if set(wanted) == {name for task in whole for name in known[task]}:
        shared = (frozenset(row for row, name in enumerate(wanted) if name in known[task]) for task in whole)
        return Candidates(tuple(whole), complete=True, shared=tuple(shared))
    allowed, shared, explained = [], [], set()
    for task, names in enumerate(known):
        shared_wanted = {row for row, name in enumerate(wanted) if name in names}
        shared_names = {column for column, name in enumerate(names) if name in wanted}
        if cosines is not None:
            for row, column in (cosines(task) >= similarity).nonzero().tolist():
                shared_wanted.add(row)
                shared_names.add(column)
        if min(len(shared_wanted), len(shared_names)) >= OVERLAP * min(len(wanted), len(names)):
            allowed.append(task)
            shared.append(frozenset(shared_wanted))
            explained |= shared_wanted
    return Candidates(tuple(allowed), complete=len(explained) == len(wanted), shared=tuple(shared))
