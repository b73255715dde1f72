"""What methods have in common that ask frozen features, too, which class an image is of."""

# B images, C classes, F features

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_moe_merge.selection import DiscriminantSelector, FeatureSource, fuse, load_selector, save_selector

from ..data.features import labelled_features
from ..data.label_space import LabelSpace
from ..data.task import Task
from .base import Method


def seen_by_clip(method: Method, source: FeatureSource, pixel_values: Tensor) -> Tensor:
    """Compute a method's frozen features, in full precision: B x F."""
    with torch.autocast(pixel_values.device.type, enabled=False):
        return method.frozen_features(source, pixel_values)


def look_at(task: Task, method: Method, source: FeatureSource) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through a task's training images once: a method's frozen features B x F and labels, batch by batch."""
    method.model.eval()
    device = next(method.model.parameters()).device

    def see(pixel_values: Tensor) -> Tensor:
        return seen_by_clip(method, source, pixel_values.to(device)).cpu()

    return labelled_features(task, method.processor.image_processor, see)


class Fused(Method):
    """Besides what a method learns, a Gaussian per class on what plain CLIP sees after its last block, see `fuse`.

    Put before a method that has routes. When a task ends its training images are looked at once, without augmentation. Kept of
    them are the means of its classes, which never change, their share of the covariance that all tasks have in common, and a
    few images' features for the temperature. An image is encoded twice: by its task's route and by plain CLIP.

    Attributes:
        gaussians: of the tasks so far. It is a task selector, too.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaussians = DiscriminantSelector.for_classes(self.model)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task = task

    def end_task(self) -> None:
        super().end_task()
        self.gaussians.fit(self.task.name, look_at(self.task, self, self.gaussians.source))

    def scorer(self, classes: LabelSpace, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Where the classes are those of one learnt task, what scores images for them is told what frozen features say."""
        by_clip = super().scorer(classes, device)
        task, *others = classes.columns
        if others or task not in self.gaussians.tasks:
            return by_clip
        position = self.gaussians.tasks.index(task)

        def scores(pixel_values: Tensor) -> Tensor:
            logits_BC = self.model.logit_scale.exp().float() * by_clip(pixel_values)
            x_BF = seen_by_clip(self, self.gaussians.source, pixel_values)
            return fuse(logits_BC, *self.gaussians.class_posterior(x_BF, position))

        return scores

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_selector(self.gaussians, folder)

    def save_so_far(self, folder: Path) -> None:
        super().save_so_far(folder)
        save_selector(self.gaussians, folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.gaussians = load_selector(folder)
