"""What a task of the stream is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from tqdm import tqdm

from .defects import refuse_null_images


@dataclass(frozen=True)
class Task:
    """One image classification task.

    Attributes:
        name: by which the model's routers and all tables know it.
        class_names: in plain words, in the order of the labels.
        templates: prompt forms with one `{}` for the class name; training uses the first, evaluation averages all.
        train: rows with `image` (PIL, of any mode) and `label` (int).
        test: the same.
        lr: peak learning rate where the user gives none.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Dataset
    test: Dataset
    lr: float = 1e-3

    def __post_init__(self):
        if len(self.class_names) < 2:
            raise ValueError(
                f"Task {self.name!r} has {len(self.class_names)} class ({', '.join(self.class_names) or 'none'}): "
                "there is nothing to tell apart. Give it at least two."
            )
        for split, dataset in (("train", self.train), ("test", self.test)):
            if not len(dataset):
                raise ValueError(f"Task {self.name!r} has no {split} images.")
            refuse_null_images(self.name, split, dataset)
            labels = set(np.unique(labels_of(dataset)).tolist())
            if not labels <= set(range(len(self.class_names))):
                raise ValueError(
                    f"Task {self.name!r} has {split} labels {sorted(labels - set(range(len(self.class_names))))} "
                    f"without a class name; its classes are {dict(enumerate(self.class_names))}."
                )

    @cached_property
    def content(self) -> str:
        """Hash what the task is made of, its name apart: classes, templates, and every label and image of both splits.

        Images are read, not decoded.
        """
        state = hashlib.sha256(json.dumps([self.class_names, self.templates]).encode())
        for dataset in (self.train, self.test):
            state.update(labels_of(dataset).astype("int64").tobytes())
            state.update(image_content(dataset, self.name).encode())
        return state.hexdigest()[:16]

    def prompts(self, template: str) -> list[str]:
        """Fill a template with every class name."""
        return [template.format(name) for name in self.class_names]


def labels_of(dataset: Dataset, column: str = "label") -> np.ndarray:
    """Read the labels and nothing else: no image is touched, and none copied."""
    return dataset.select_columns(column).with_format("numpy")[:][column]


def relabelled(dataset: Dataset, numbers: Mapping[int, int]) -> Dataset:
    """Take the images of some classes, in their order, and give each label the number that stands beside it."""
    rows = dataset.select(np.flatnonzero(np.isin(labels_of(dataset), list(numbers))).tolist())
    labels = [numbers[label] for label in labels_of(rows).tolist()]
    return rows.remove_columns("label").add_column("label", labels)


def image_content(dataset: Dataset, name: str) -> str:
    """Hash the files of all images, in their order; nothing is decoded. `name` is for a bar where it takes long."""
    files = dataset.select_columns("image").cast_column("image", Image(decode=False))
    state = hashlib.sha256()
    for row in tqdm(files, desc=f"reading {name}", leave=False, delay=5):
        image = row["image"]
        content = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()
