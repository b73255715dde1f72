"""The embedded benchmark cut into many small, related tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from ..mini import TASKS, load_task
from ..task import Task, labels_of
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
        splits = (self._of_classes(load_task(whole, split), labels, names) for split in ("train", "test"))
        return Task(name, names, task.templates, *splits)

    @staticmethod
    def _cut(name: str) -> list[list[int]]:
        classes = len(TASKS[name].classes)
        return [part.tolist() for part in np.array_split(np.arange(classes), max(1, classes // CLASSES))]

    @staticmethod
    def _of_classes(images: Dataset, labels: list[int], names: tuple[str, ...]) -> Dataset:
        rows = images.select(np.flatnonzero(np.isin(labels_of(images), labels)).tolist())
        numbers = [labels.index(label) for label in labels_of(rows)]
        return (
            rows.remove_columns("label")
            .add_column("label", numbers)
            .cast_column("label", ClassLabel(names=list(names)))
        )
