"""What methods have in common that ask frozen features, too, which class an image is of."""

# B images, C classes, F features, P projection width

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_moe_merge.selection import Depths, DiscriminantSelector, fuse, load_selector, save_selector
from peft_moe_merge.selection.features import TOKENS

from ..data.batches import eval_batches
from ..data.task import Task
from .base import Method


class Fused(Method):
    """Besides what a method learns, a Gaussian per class on what plain CLIP sees after its last block, see `fuse`.

    Put before a method that has routes. When a task ends its training images are looked at once, without augmentation; kept of them
    are the means of its classes, a share of the covariance that all tasks have in common, and a few images' features for the
    temperature. So nothing of it is forgotten. An image is encoded twice: by its task's route and by plain CLIP.

    Attributes:
        gaussians: of the tasks so far. It is a task selector, too.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        last = len(self.model.vision_model.encoder.layers)
        self.gaussians = DiscriminantSelector(Depths((last,), tuple(TOKENS)), means="classes", shared=(1.0,))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task = task

    def end_task(self) -> None:
        super().end_task()
        self.fit_gaussians(self.task)

    def fit_gaussians(self, task: Task) -> None:
        """Learn a task's classes from its training images."""
        self.model.eval()
        self.gaussians.fit(task.name, self._labelled_features(task))

    @torch.no_grad()
    def _labelled_features(self, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(self.model.parameters()).device
        for batch in eval_batches(task.train, self.processor.image_processor, batch_size=64):
            yield self.seen_by_clip(batch["pixel_values"].to(device)), batch["labels"]

    def seen_by_clip(self, pixel_values: Tensor) -> Tensor:
        """Compute what the Gaussians are of, in full precision: B x F."""
        with torch.autocast(pixel_values.device.type, enabled=False):
            return self.frozen_features(self.gaussians.source, pixel_values)

    def class_features(self, task: Task, device: torch.device) -> Tensor:
        """Encode the classes. Those of a learnt task are unit vectors C x C then, as its images are scores."""
        classes_CP = super().class_features(task, device)
        self.asked = (self.gaussians.tasks.index(task.name), classes_CP) if task.name in self.gaussians.tasks else None
        return classes_CP if self.asked is None else torch.eye(len(classes_CP), device=device)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images, B x P; score them for the classes that were asked for last, B x C, where their task is learnt."""
        features_BP = super().image_features(pixel_values)
        if self.asked is None:
            return features_BP
        task, classes_CP = self.asked
        logits_BC = self.model.logit_scale.exp().float() * features_BP @ classes_CP.T
        return fuse(logits_BC, *self.gaussians.class_posterior(self.seen_by_clip(pixel_values), task))

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_selector(self.gaussians, folder)

    def save_so_far(self, folder: Path) -> None:
        super().save_so_far(folder)
        save_selector(self.gaussians, folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.gaussians = load_selector(folder)
