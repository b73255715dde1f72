"""The embedded benchmark's things and places, in tasks of labels that are alike, or of labels that are not.

What differs between the two is only which classes a task has: all classes and all images are the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets
from scipy.cluster.hierarchy import leaves_list, linkage

from peft_moe_merge.inference.zero_shot import class_features, prompts_of

from ...clip import load_clip
from ..mini import TASKS, load_task, mini_clip_path
from ..task import Task, relabelled
from .base import Suite

SOURCES = ("animals", "flowers", "food", "scenes", "vehicles")
TEMPLATE = "a photo of {}."
GROUPS = 8
"""Tasks, of as many classes each: 64 in all."""


@cache
def by_likeness() -> tuple[tuple[str, int], ...]:
    """Return all classes, as task of `mini` and label there, in a row in which neighbours are alike.

    Alike are classes whose prompts the embedded CLIP's text tower puts near each other: the leaves of an average linkage
    by cosine, turned so that neighbours are as near as they can be.
    """
    classes = [(source, label) for source in SOURCES for label in range(len(TASKS[source].classes))]
    clip, processor = load_clip(mini_clip_path())
    names = [TASKS[source].classes[label] for source, label in classes]
    texts_CP = class_features(clip, processor.tokenizer, prompts_of(names, [TEMPLATE]))
    leaves = leaves_list(linkage(texts_CP.double().numpy(), "average", metric="cosine", optimal_ordering=True))
    return tuple(classes[leaf] for leaf in leaves)


class MiniSimilar(Suite):
    """Eight tasks of eight classes each, as alike as can be within a task: tasks differ, telling classes apart is hard."""

    name = "mini_similar"

    def task_names(self) -> list[str]:
        return [f"{self.name}_{group}" for group in range(1, GROUPS + 1)]

    def load_task(self, name: str, settings: Any) -> Task:
        classes = self._groups()[self.task_names().index(name)]
        names = tuple(TASKS[source].classes[label] for source, label in classes)
        return Task(name, names, (TEMPLATE,), *(self._images(classes, names, split) for split in ("train", "test")))

    @staticmethod
    def _groups() -> list[list[tuple[str, int]]]:
        row = by_likeness()
        return [list(row[start : start + len(row) // GROUPS]) for start in range(0, len(row), len(row) // GROUPS)]

    @staticmethod
    def _images(classes: list[tuple[str, int]], names: tuple[str, ...], split: str) -> Dataset:
        parts = [
            relabelled(load_task(source, split), {label: number}) for number, (source, label) in enumerate(classes)
        ]
        return concatenate_datasets(parts).cast_column("label", ClassLabel(names=list(names)))


class MiniDissimilar(MiniSimilar):
    """The same classes dealt out like cards: unlike within a task, so that each task has something of every other."""

    name = "mini_dissimilar"

    @staticmethod
    def _groups() -> list[list[tuple[str, int]]]:
        row = by_likeness()
        return [list(row[group::GROUPS]) for group in range(GROUPS)]
