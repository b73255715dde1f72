"""Batches from data loaders, in whatever form they come, once or again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader


def images_of(batch: Any) -> torch.Tensor:
    """Return the pixel values of a batch: the batch itself, its first item, or the one of that name."""
    if isinstance(batch, Mapping):
        return batch["pixel_values"]
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def labels_of(batch: Any) -> torch.Tensor:
    """Return the labels of a batch: its second item, or the one of the name "labels".

    Raises:
        ValueError: it has none.
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ValueError(
        f"the loss 'cross_entropy' needs labels, but a batch is {type(batch).__name__} without them: give (images, labels), "
        "or a mapping with 'labels'; or take a loss without labels, 'mutual_information'."
    )


def endless(loader: Iterable, task: str, seed: int, start: int = 0) -> Iterator[Any]:
    """Yield batches number `start` and on of a loader that is run through again and again.

    What the loader draws from torch's generators depends on the seed and the number of the batch alone, so that a
    run that was stopped sees the images that it would have seen.
    """
    number = 0
    while True:
        if isinstance(loader, DataLoader) and loader.generator is not None:
            loader.generator.manual_seed(seed + 100_003 * number)
        iterator, first = None, number
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 100_003 * number)
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, None)
            if batch is None:
                break
            if number >= start:
                yield batch
            number += 1
        if number == first:
            raise ValueError(
                f"the batches of task {task!r} are used up; give a list or a DataLoader, not an iterator."
            )
