"""What a suite of tasks is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from tqdm import tqdm

from ..task import Task


class Suite(ABC):
    """Tasks that belong together. A class in a file of this folder is found by its `name`.

    Attributes:
        name: by which `--suite` takes it.
        second_order: the names of all its tasks in another order than the alphabetical one, `--order II`, if it has one.
    """

    name: ClassVar[str]
    second_order: ClassVar[tuple[str, ...] | None] = None

    @abstractmethod
    def task_names(self) -> list[str]:
        """List the tasks. Nothing is loaded for it."""

    @abstractmethod
    def load_task(self, name: str, settings: Any) -> Task:
        """Load one task, with all its images.

        Args:
            name: of `task_names()`.
            settings: the stream's `DataSettings`.
        """

    def load(self, tasks: Sequence[str] | None, settings: Any, progress: bool) -> list[Task]:
        """Load tasks in the order given, or all of them.

        Raises:
            ValueError: there is no such task.
        """
        available = self.task_names()
        unknown = [name for name in tasks or () if name not in available]
        if unknown:
            raise ValueError(
                f"The suite {self.name!r} has no task {', '.join(map(repr, unknown))}. Tasks: {available}."
            )
        bar = tqdm(tasks or available, desc="loading", leave=False, disable=not progress, delay=1)
        return [self.load_task(name, settings) for name in bar]
