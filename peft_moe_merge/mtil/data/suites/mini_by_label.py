"""The embedded benchmark's things and places, in tasks of labels that are alike, or of labels that are not.

What differs between the two is only which classes a task has: all classes and all images are the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from scipy.cluster.hierarchy import leaves_list, linkage
from torch.nn import functional as F

from ...clip import load_clip
from ..mini import TASKS, load_task, mini_clip_path
from ..task import Task, labels_of
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
    prompts = [TEMPLATE.format(TASKS[source].classes[label]) for source, label in classes]
    with torch.no_grad():
        tokens = processor(text=prompts, return_tensors="pt", padding=True)
        texts_CP = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
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
        parts = []
        for number, (source, label) in enumerate(classes):
            images = load_task(source, split)
            rows = images.select(np.flatnonzero(np.equal(labels_of(images), label)).tolist()).remove_columns("label")
            parts.append(rows.add_column("label", [number] * len(rows)))
        return concatenate_datasets(parts).cast_column("label", ClassLabel(names=list(names)))


class MiniDissimilar(MiniSimilar):
    """The same classes dealt out like cards: unlike within a task, so that each task has something of every other."""

    name = "mini_dissimilar"

    @staticmethod
    def _groups() -> list[list[tuple[str, int]]]:
        row = by_likeness()
        return [list(row[group::GROUPS]) for group in range(GROUPS)]
