"""Batches of a task: images through CLIP's preprocessing, in an order that depends on the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, v2
from transformers import BaseImageProcessor

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
        dataset: rows with `image` and `label`.
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
            v2.RGB(),
            v2.RandomResizedCrop(
                (size["height"], size["width"]), scale=(crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC
            ),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    return DataLoader(
        dataset.with_transform(_Preprocess(lambda images: torch.stack([augment(image) for image in images]))),
        batch_size=batch_size,
        sampler=order[: steps * batch_size].tolist(),
        num_workers=num_workers,
        generator=generator,
    )


def eval_batches(
    dataset: Dataset, processor: BaseImageProcessor, *, batch_size: int, num_workers: int = 0
) -> DataLoader:
    """Go through all images once, in order, through the processor itself."""
    transform = _Preprocess(lambda images: processor(images, return_tensors="pt")["pixel_values"])
    return DataLoader(dataset.with_transform(transform), batch_size=batch_size, num_workers=num_workers)


class _Preprocess:
    def __init__(self, pixels: Callable[[list[Any]], torch.Tensor]):
        self.pixels = pixels

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        images = [image.convert("RGB") for image in rows["image"]]
        return {"pixel_values": list(self.pixels(images)), "labels": rows["label"]}
