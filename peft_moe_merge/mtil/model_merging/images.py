"""A task as tensors: three splits that share no image, and its classes as text features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.inference.rgb import to_rgb
from peft_moe_merge.inference.zero_shot import class_features, prompts_of

from ..data.task import Task


@dataclass(frozen=True)
class TaskImages:
    """All images of a task in memory, for the sets of some thousand small images that this comparison is made on.

    Attributes:
        name: of the task.
        head_CD: normalised text features of its classes, the mean over its templates.
        finetune: pixel values and labels to fine-tune on, four fifths of the training images.
        adapt: the other fifth, for adaptation, whose labels are never used.
        test: pixel values and labels to test on.
    """

    name: str
    head_CD: torch.Tensor
    finetune: TensorDataset
    adapt: TensorDataset
    test: TensorDataset


@torch.no_grad()
def load_images(task: Task, clip: CLIPModel, processor: CLIPProcessor, seed: int = 0) -> TaskImages:
    """Preprocess a task's images as the CLIP wants them, and encode its classes.

    Args:
        task: what to load.
        clip: the pretrained model, for the text features.
        processor: its processor.
        seed: of the division of the training images.
    """

    def preprocess(rows) -> TensorDataset:
        images = [to_rgb(image) for image in rows["image"]]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return TensorDataset(pixels, torch.tensor(rows["label"]))

    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    adapt = max(1, len(order) // 5)
    return TaskImages(
        name=task.name,
        head_CD=class_features(clip, processor.tokenizer, prompts_of(task.class_names, task.templates)).cpu(),
        finetune=preprocess(task.train.select(order[adapt:])),
        adapt=preprocess(task.train.select(order[:adapt])),
        test=preprocess(task.test),
    )


def batches(images: TensorDataset, batch_size: int, shuffle: bool = True) -> DataLoader:
    """Return a loader of `(pixel_values, labels)`."""
    return DataLoader(images, batch_size=min(batch_size, len(images)), shuffle=shuffle, drop_last=shuffle)
