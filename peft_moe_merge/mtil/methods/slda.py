"""Streaming linear discriminant analysis: a Gaussian per class on what plain CLIP sees, and no training."""

# B images, C classes asked about, P projection width

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_moe_merge.selection import FeatureSource, load_selector, save_selector

from ..data.task import Task
from .base import Method
from .fused import gaussians_for, labelled_features, seen_by_clip


class Slda(Method):
    """What the frozen features alone give that `moe_lora_fused` takes into account.

    Hayes and Kanan, Lifelong machine learning with deep streaming linear discriminant analysis, arXiv 1909.01520: means of
    classes and one covariance for all, updated image by image. Shrinkage is chosen on images held out, and one Gaussian stands
    for a class of a task. Where all classes asked about are those of learnt tasks, the Gaussians alone decide, and plain CLIP
    where none of these tasks is. Otherwise an image is of none of them, and CLIP's, as likely as `posterior` has it.

    Attributes:
        gaussians: of the tasks so far.
        prompts: of each task's classes, by the first template.
    """

    name = "slda"
    trains = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gaussians = gaussians_for(self.model)
        self.prompts: list[list[str]] = []

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return none."""
        return []

    def learn(self, task: Task) -> None:
        self.gaussians.fit(task.name, labelled_features(self, self.gaussians.source, task))
        self.prompts = [*self.prompts, list(task.prompts(task.templates[0]))]

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        """Compute what the Gaussians are of: B x F."""
        return source(self.model, pixel_values)

    def encode_classes(self, prompts: Sequence[Sequence[str]], device: torch.device) -> Tensor:
        """Remember which classes are asked about. Their features are unit vectors C x C, as images' are scores."""
        self.asked_CP = super().encode_classes(prompts, device)
        column = {prompt: c for c, of_class in enumerate(prompts) for prompt in of_class}
        self.columns = {
            task: torch.tensor([column[prompt] for prompt in own], device=device)
            for task, own in enumerate(self.prompts)
            if all(prompt in column for prompt in own)
        }
        return torch.eye(len(prompts), device=device)

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Score images for the classes that `encode_classes` was given last: B x C, which add up to 1."""
        features_BP = super().image_features(pixel_values)
        scores_BC = (self.model.logit_scale.exp().float() * features_BP @ self.asked_CP.T).softmax(dim=1)
        if not self.columns:
            return scores_BC
        x_BF = seen_by_clip(self, self.gaussians.source, pixel_values)
        complete = len(torch.cat(list(self.columns.values())).unique()) == scores_BC.shape[1]
        likely_BR = self.gaussians.posterior(x_BF, list(self.columns), may_be_none=not complete)
        scores_BC = likely_BR[:, -1:] * scores_BC
        for task, columns_K in self.columns.items():
            labels_K, log_BK = self.gaussians.class_posterior(x_BF, task)
            scores_BC = scores_BC.index_add(1, columns_K[labels_K], likely_BR[:, task : task + 1] * log_BK.exp())
        return scores_BC

    def save(self, folder: Path) -> None:
        save_selector(self.gaussians, folder)
        (folder / "learnt.json").write_text(json.dumps(self.prompts))

    def load(self, folder: Path) -> None:
        self.gaussians = load_selector(folder)
        self.prompts = json.loads((folder / "learnt.json").read_text())
