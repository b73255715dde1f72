"""Batches of a task: images through CLIP's preprocessing, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from transformers import BaseImageProcessor

from peft_moe_merge.inference.rgb import to_rgb

Batch = dict[str, torch.Tensor]
"""`pixel_values` B x 3 x H x W and `labels` B."""


def train_batches(
    dataset: Dataset,
    processor: BaseImageProcessor,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    crop_scale: float,
    num_workers: int = 0,
) -> DataLoader:
    """Draw exactly `steps` batches: every image once in random order, then again in another, and so on.

    Args:
        dataset: rows with `image`, of any mode that `to_rgb` takes, and `label`.
        processor: the CLIP's image processor, for size, mean and standard deviation.
        steps: batches to draw.
        batch_size: images per batch.
        seed: of the order.
        crop_scale: smallest part of an image's area that a random-resized crop keeps.
        num_workers: processes that decode.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch_size // len(dataset))
    order = torch.cat([torch.randperm(len(dataset), generator=generator) for _ in range(passes)])
    size = processor.crop_size or processor.size
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(
                (size["height"], size["width"]), scale=(crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    return DataLoader(
        _Rows(dataset, partial(_augmented, augment)),
        batch_size=batch_size,
        sampler=order[: steps * batch_size].tolist(),
        num_workers=num_workers,
        generator=generator,
        pin_memory=torch.cuda.is_available(),
    )


def eval_batches(
    dataset: Dataset, processor: BaseImageProcessor, *, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """Go through all images once, in order, through the processor itself."""
    rows = _Rows(dataset, partial(_processed, processor))
    pin_memory = torch.cuda.is_available()  # so that a copy to the GPU can go on beside its work
    return DataLoader(rows, batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory)


def _rgb(image: Image | None) -> Image:
    if image is None:
        raise ValueError("there is no image")
    return to_rgb(image)


# by name, not as lambdas: where processes are spawned, what they are given is pickled


def _augmented(augment: v2.Transform, images: list[Image]) -> torch.Tensor:
    return torch.stack([augment(image) for image in images])


def _processed(processor: BaseImageProcessor, images: list[Image]) -> torch.Tensor:
    return processor(images, return_tensors="pt")["pixel_values"]


class _Rows(torch.utils.data.Dataset):
    """Rows as a model takes them. One that can't be read is named."""

    def __init__(self, dataset: Dataset, pixels: Callable[[list[Image]], torch.Tensor]):
        self.dataset, self.pixels = dataset, pixels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, Any]]:
        try:
            found = self.dataset[rows]
            images = [_rgb(image) for image in found["image"]]
        except Exception as error:  # Pillow's readers raise whatever they meet
            raise self._named(rows) or error from error
        pixels = self.pixels(images)
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, found["label"], strict=True)]

    def _named(self, rows: list[int]) -> ValueError | None:
        for row in rows:
            try:
                _rgb(self.dataset[row]["image"])
            except Exception as error:
                source = f"{self.dataset.info.dataset_name or 'the data set'!s}, split {str(self.dataset.split)!r}"
                return ValueError(
                    f"Row {row} of {source} can't be read: {error}. Replace or remove the image; for the data sets of "
                    "the Hub the prefetch command finds all such images by --verify."
                )
        return None
