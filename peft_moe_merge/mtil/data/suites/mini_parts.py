"""The embedded benchmark cut into many small, related tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel

from ..mini import TASKS, load_task
from ..task import Task, relabelled
from .base import Suite

CLASSES = 2
"""In a part, or one more: the classes of a task that are left over join its last parts."""


class MiniParts(Suite):
    """Every task of `mini` in parts of a few classes, such as `animals_2`: the same style, other things to tell apart.

    For what needs many tasks, or related ones.
    """

    name = "mini_parts"

    def task_names(self) -> list[str]:
        return [f"{name}_{part}" for name in TASKS for part in range(1, len(self._cut(name)) + 1)]

    def load_task(self, name: str, settings: Any) -> Task:
        whole, _, part = name.rpartition("_")
        labels = self._cut(whole)[int(part) - 1]
        task = TASKS[whole]
        names = tuple(task.classes[label] for label in labels)
        numbers = {label: number for number, label in enumerate(labels)}
        splits = (relabelled(load_task(whole, split), numbers) for split in ("train", "test"))
        classes = ClassLabel(names=list(names))
        return Task(name, names, task.templates, *(split.cast_column("label", classes) for split in splits))

    @staticmethod
    def _cut(name: str) -> list[list[int]]:
        classes = len(TASKS[name].classes)
        return [part.tolist() for part in np.array_split(np.arange(classes), max(1, classes // CLASSES))]
