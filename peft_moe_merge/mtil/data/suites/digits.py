"""scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

from ..digits import GROUPS, load_digit_tasks
from ..task import Task
from .base import Suite


class Digits(Suite):
    """Three small tasks of real handwriting; nothing is downloaded."""

    name = "digits"

    def task_names(self) -> list[str]:
        return list(GROUPS)

    def load_task(self, name: str, settings: Any) -> Task:
        return next(task for task in load_digit_tasks() if task.name == name)
