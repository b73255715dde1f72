"""The embedded benchmark."""

from __future__ import annotations

from typing import Any

from ..mini import TASKS, load_task
from ..task import Task
from .base import Suite


class Mini(Suite):
    """Eleven tasks, ten of them rendered; nothing is downloaded."""

    name = "mini"
    second_order = (
        "vehicles",
        "flowers",
        "digits",
        "food",
        "scenes",
        "textures",
        "aerial",
        "animals",
        "shapes",
        "letters",
        "colors",
    )
    """Neighbours of Order I, which is alphabetical, are apart."""

    def task_names(self) -> list[str]:
        return list(TASKS)

    def load_task(self, name: str, settings: Any) -> Task:
        task = TASKS[name]
        return Task(name, task.classes, task.templates, load_task(name, "train"), load_task(name, "test"))
