"""mini-MTIL: 11 small image-classification tasks in the manner of MTIL's domains, and a small CLIP to learn them with.

Nothing is downloaded: ten tasks are rendered procedurally, one is scikit-learn's handwritten digits. Each comes as a
`datasets.Dataset` with `image` and a `ClassLabel`, like the sets of the Hub.

    task = TASKS["flowers"]                      # templates, class names
    train = load_task("flowers", "train")        # datasets.Dataset
    model = CLIPModel.from_pretrained(mini_clip_path())
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps

from .canvas import IMAGE_SIZE, render
from .tasks import TASKS, MiniTask

__all__ = ["IMAGE_SIZE", "TASKS", "MiniTask", "load_task", "mini_clip_path"]

_SPLITS = ("train", "test")
_DIGITS_TRAIN_SHARE = 0.65
_DIGITS_MARGIN = 4


def mini_clip_path() -> str:
    """Folder of the small pretrained CLIP, in the Hub's file layout.

    Returns:
        A path for `CLIPModel.from_pretrained`, `AutoProcessor.from_pretrained` or a `transformers.pipeline`.
    """
    return str(Path(__file__).with_name("clip"))


@functools.cache
def load_task(
    name: str, split: str, seed: int = 0, train_per_class: int = 32, test_per_class: int = 20
) -> datasets.Dataset:
    """One split of one task; the same arguments give the same pixels.

    Images are drawn one by one from their own seeds, so that asking for fewer per class gives a subset. Train and test
    never share a seed nor, for the handwritten digits, an image: those are divided once and for all, and `seed` only
    changes which of its side are taken. Results are kept in memory; the whole suite is made in a few seconds.

    Args:
        name: a key of `TASKS`.
        split: `"train"` or `"test"`.
        seed: another seed is another sample of the same task.
        train_per_class: images of each class in the training split.
        test_per_class: images of each class in the test split.

    Returns:
        A data set, sorted by class, with the features `image` (RGB, `IMAGE_SIZE` x `IMAGE_SIZE`) and `label`, a
        `ClassLabel` with the names `TASKS[name].classes`.

    Raises:
        ValueError: for an unknown task or split, a size below 1, or more handwritten digits than there are.
    """
    if name not in TASKS:
        raise ValueError(f"unknown mini-MTIL task {name!r}; the tasks are {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}; mini-MTIL has {' and '.join(map(repr, _SPLITS))}")
    per_class = train_per_class if split == "train" else test_per_class
    if per_class < 1:
        raise ValueError(f"{split}_per_class must be at least 1, got {per_class}")
    task = TASKS[name]
    if task.style is None:
        images = _handwritten_digits(split, seed, per_class)
    else:
        images = [
            render(concept, task.style, np.random.default_rng(_image_seed(name, split, seed, label, k)))
            for label, concept in enumerate(task.concepts.values())
            for k in range(per_class)
        ]
    labels = [label for label in range(len(task.classes)) for _ in range(per_class)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.classes))})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def _image_seed(name: str, split: str, seed: int, label: int, k: int) -> list[int]:
    return [seed, zlib.crc32(name.encode()), _SPLITS.index(split), label, k]


def _handwritten_digits(split: str, seed: int, per_class: int) -> list[Image.Image]:
    """Real digits (8 x 8, 16 grey levels), enlarged, with MNIST's margin; the first 65 % of each class train, the others test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images: list[Image.Image] = []
    for value in range(10):
        members = np.flatnonzero(digits.target == value)
        border = int(_DIGITS_TRAIN_SHARE * len(members))
        side = members[:border] if split == "train" else members[border:]
        if per_class > len(side):
            raise ValueError(
                f"{split}_per_class={per_class}, but the digits task has only {len(side)} real {split} images of "
                f"'{TASKS['digits'].classes[value]}'; ask for at most that many"
            )
        chosen = np.random.default_rng(_image_seed("digits", split, seed, value, 0)).permutation(side)[:per_class]
        for index in chosen:
            grey = Image.fromarray((digits.images[index] * 255 / 16).round().astype(np.uint8))
            grey = grey.resize((IMAGE_SIZE - 2 * _DIGITS_MARGIN,) * 2, Image.Resampling.BICUBIC)
            images.append(ImageOps.expand(grey, _DIGITS_MARGIN).convert("RGB"))
    return images
