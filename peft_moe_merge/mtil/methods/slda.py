"""Streaming linear discriminant analysis: a Gaussian per class on what plain CLIP sees, and no training."""

# B images, C classes asked about, F features, K classes of a task, R routes (the learnt tasks, then none)

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_moe_merge.selection import DiscriminantSelector, FeatureSource, load_selector, save_selector

from ..data.label_space import LabelSpace
from ..data.task import Task
from .base import Method
from .fused import look_at, seen_by_clip


class Slda(Method):
    """What the frozen features alone give that `moe_lora_fused` takes into account.

    Hayes and Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, arXiv 1909.01520: means of
    classes and one covariance for all, updated image by image. Shrinkage is chosen on images held out, and one Gaussian stands
    for a class of a task. Where all classes asked about are those of learnt tasks, the Gaussians alone decide, and plain CLIP
    where none of these tasks is. Otherwise an image is of none of them, and CLIP's, as likely as `posterior` has it.

    Attributes:
        gaussians: of the tasks so far.
    """

    name = "slda"
    trains = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaussians = DiscriminantSelector.for_classes(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return none."""
        return []

    def learn(self, task: Task) -> None:
        self.gaussians.fit(task.name, look_at(task, self, self.gaussians.source))

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        """Compute what the Gaussians are of: B x F."""
        return source(self.model, pixel_values)

    def scorer(self, classes: LabelSpace, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return what scores images for classes: B x C, which add up to 1."""
        by_clip, tasks = super().scorer(classes, device), self.gaussians.tasks
        columns = {t: classes.columns[task].to(device) for t, task in enumerate(tasks) if task in classes.columns}
        known = len(torch.cat(list(columns.values())).unique()) if columns else 0
        may_be_none = known < len(classes.names)

        def scores(pixel_values: Tensor) -> Tensor:
            scores_BC = (self.model.logit_scale.exp().float() * by_clip(pixel_values)).softmax(dim=1)
            if not columns:
                return scores_BC
            x_BF = seen_by_clip(self, self.gaussians.source, pixel_values)
            likely_BR = self.gaussians.posterior(x_BF, list(columns), may_be_none=may_be_none)
            scores_BC = likely_BR[:, -1:] * scores_BC
            for task, columns_K in columns.items():
                labels_K, log_BK = self.gaussians.class_posterior(x_BF, task)
                scores_BC = scores_BC.index_add(1, columns_K[labels_K], likely_BR[:, task : task + 1] * log_BK.exp())
            return scores_BC

        return scores

    def save(self, folder: Path) -> None:
        save_selector(self.gaussians, folder)

    def load(self, folder: Path) -> None:
        self.gaussians = load_selector(folder)
