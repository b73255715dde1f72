"""A stream that needs no files: scikit-learn's bundled handwritten digits, split into tasks by class."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .task import Task
from .templates import TEMPLATES

GROUPS = {"digits_0_to_3": range(4), "digits_4_to_6": range(4, 7), "digits_7_to_9": range(7, 10)}


def load_digit_tasks() -> list[Task]:
    """Load three tasks of 3 or 4 digits each: real handwriting, 8 x 8 pixels, a fixed quarter of it for testing."""
    data = load_digits()
    images = (data.images * 255 / 16).round().astype(np.uint8)
    train, test = train_test_split(np.arange(len(images)), test_size=0.25, random_state=0, stratify=data.target)

    def dataset(rows: np.ndarray, digits: range) -> Dataset:
        rows = rows[np.isin(data.target[rows], list(digits))]
        features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in digits])})
        columns = {"image": list(images[rows]), "label": [digits.index(label) for label in data.target[rows]]}
        return Dataset.from_dict(columns, features=features)

    return [
        Task(
            name=name,
            class_names=tuple(str(digit) for digit in digits),
            templates=TEMPLATES["mnist"],
            train=dataset(train, digits),
            test=dataset(test, digits),
        )
        for name, digits in GROUPS.items()
    ]
