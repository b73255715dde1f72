"""What a task of the stream is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from datasets import Dataset

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

    def prompts(self, template: str) -> list[str]:
        """Fill a template with every class name."""
        return [template.format(name) for name in self.class_names]


def labels_of(dataset: Dataset, column: str = "label") -> np.ndarray:
    """Read the labels and nothing else: no image is touched, and none copied."""
    return dataset.select_columns(column).with_format("numpy")[:][column]
