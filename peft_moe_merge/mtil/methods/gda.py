"""Gaussian discriminant analysis beside plain CLIP: nothing is trained."""

# B images, F features, P projection width

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from peft_moe_merge.selection import FeatureSource

from ..data.task import Task
from .base import Method
from .fused import Fused


class PlainRoutes(Method):
    """CLIP as it is, by whatever route."""

    trains = False
    routes_stay = True

    @property
    def learnt(self) -> list[str]:
        """The tasks so far."""
        return self.gaussians.tasks

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return none."""
        return []

    def set_task(self, task: str | None) -> None:
        """Do nothing: all routes are alike."""

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        return source(self.model, pixel_values)

    def routed_image_features(self, pixel_values: Tensor, task_ids: Tensor) -> Tensor:
        return Method.image_features(self, pixel_values)

    def save(self, folder: Path) -> None:
        """Write nothing: the Gaussians are all there is."""

    def load(self, folder: Path) -> None:
        """Read nothing."""


class Gda(Fused, PlainRoutes):
    """The Gaussians of all classes fused with plain CLIP's own opinion: what frozen features alone give.

    Wang et al., A hard-to-beat baseline for training-free CLIP-based adaptation, arXiv 2402.04087. There the features are CLIP's
    embeddings, and a weight between the two is tuned on held-out images; here they are the tokens after the last block, with
    one covariance for all tasks, and the temperature takes the weight's place.
    """

    name = "gda"

    def learn(self, task: Task) -> None:
        self.fit_gaussians(task)
