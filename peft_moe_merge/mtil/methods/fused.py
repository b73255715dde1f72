"""What methods have in common that ask frozen features, too, which class an image is of."""

# B images, C classes, F features, P projection width

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import CLIPModel

from peft_moe_merge.selection import Depths, DiscriminantSelector, FeatureSource, fuse, load_selector, save_selector
from peft_moe_merge.selection.features import TOKENS

from ..data.batches import eval_batches
from ..data.task import Task
from .base import Method

BATCH = 64


def gaussians_for(clip: CLIPModel) -> DiscriminantSelector:
    """Make what keeps a Gaussian per class of the tokens after the last block, with one covariance for all."""
    last = len(clip.vision_model.encoder.layers)
    return DiscriminantSelector(Depths((last,), tuple(TOKENS)), means="classes", shared=(1.0,))


def seen_by_clip(method: Method, source: FeatureSource, pixel_values: Tensor) -> Tensor:
    """Compute a method's frozen features, in full precision: B x F."""
    with torch.autocast(pixel_values.device.type, enabled=False):
        return method.frozen_features(source, pixel_values)


@torch.no_grad()
def labelled_features(method: Method, source: FeatureSource, task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through a task's training images once, without augmentation: their frozen features and labels, batch by batch.

    Several processes share the images, and each gets the features of all.
    """
    method.model.eval()
    device, state = next(method.model.parameters()).device, PartialState()
    own = task.train.select(range(state.process_index, len(task.train), state.num_processes))
    batches = iter(eval_batches(own, method.processor.image_processor, batch_size=BATCH))
    for _ in range(math.ceil(len(task.train) / (BATCH * state.num_processes))):
        found = []
        if (batch := next(batches, None)) is not None:  # the last one is not everybody's
            features_BF = seen_by_clip(method, source, batch["pixel_values"].to(device))
            found.append((features_BF.cpu(), batch["labels"].cpu()))
        yield from gather_object(found)


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
        self.gaussians = gaussians_for(self.model)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task = task

    def end_task(self) -> None:
        super().end_task()
        self.gaussians.fit(self.task.name, labelled_features(self, self.gaussians.source, self.task))

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
        x_BF = seen_by_clip(self, self.gaussians.source, pixel_values)
        return fuse(logits_BC, *self.gaussians.class_posterior(x_BF, task))

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_selector(self.gaussians, folder)

    def save_so_far(self, folder: Path) -> None:
        super().save_so_far(folder)
        save_selector(self.gaussians, folder)

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.gaussians = load_selector(folder)
