"""Gaussians on frozen features: closed form, in one pass.

Shapes: B images, F features, T tasks, C components of a task, S components of all tasks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .features import FeatureSource
from .moments import Moments, shrink
from .taskwise import TaskwiseSelector


class GaussianSelector(TaskwiseSelector):
    """A mean per task and one covariance for all: linear discriminant analysis that grows task by task.

    A task's score is the log-likelihood of the image up to a constant, `-d^2 / 2`, with `d` the Mahalanobis distance
    from the task's mean. The covariance is the scatter within tasks, pooled over all tasks so far and shrunk
    (`moments.shrink`). It changes with each task, and with it the distances of old tasks, whose images are gone; their
    thresholds are scaled by the change of the mean squared distance, which follows from the pooled scatter.

    Args:
        source, reject_rate, held_out, per_batch, seed: see `Selector`.
        per_class: a mean per class instead of per task, equally likely within the task; needs labels. The covariance
            is then that within classes.
    """

    kind = "gaussian"
    own_names = ("means",)
    shared_names = ("scatter", "images")

    def __init__(self, source: FeatureSource | None = None, *, per_class: bool = False, **options: Any):
        super().__init__(source, **options)
        self.per_class = per_class

    def options(self) -> dict[str, Any]:
        return {**super().options(), "per_class": self.per_class}

    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        moments = None
        for features_BF, labels_B in batches:
            if self.per_class and labels_B is None:
                raise ValueError("`per_class` needs labels: pass batches of (features, labels).")
            if moments is None:
                moments = Moments(features_BF.shape[1])
            moments.update(features_BF, labels_B if self.per_class else torch.zeros(len(features_BF)).long())
        seen_C = moments.counts_C > 0
        shared = {"scatter": moments.scatter_FF, "images": moments.counts_C.sum()}
        if self.shared:
            shared = {name: tensor + self.shared[name] for name, tensor in shared.items()}
        covariance_FF, intensity = self._covariance(shared)
        freedom, width = int(shared["images"]) - 1, len(covariance_FF)
        if freedom < width:
            warnings.warn(
                f"{freedom + 1} images so far are fewer than a covariance of {width} features needs: it is shrunk by "
                f"{intensity:.0%} toward one without correlations. More images or fewer features make it better.",
                stacklevel=4,
            )
        return {"means": moments.means_CF[seen_C]}, shared

    @staticmethod
    def _covariance(shared: dict[str, Tensor]) -> tuple[Tensor, float]:
        images = shared["images"].item()
        return shrink(shared["scatter"] / max(images, 1.0), images)

    def _add(self, task: str, own: dict[str, Tensor], shared: dict[str, Tensor], held_out: list[Tensor]) -> None:
        if self.shared and self.reject_rate > 0:
            old = self.shared["scatter"]
            before, now = (
                (torch.cholesky_inverse(torch.linalg.cholesky(self._covariance(state)[0])) * old).sum()
                for state in (self.shared, shared)
            )
            if before > 0:
                factors = torch.stack([now / before, now / before, torch.ones_like(now)])  # quantile, mean, images
                self.own = [
                    {**of_old, "threshold": of_old["threshold"].flatten() * factors[: of_old["threshold"].numel()]}
                    for of_old in self.own
                ]
        super()._add(task, own, shared, held_out)

    def _prepare(self, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
        """Whiten: distances then are Euclidean. Features are centred first, so that float32 suffices."""
        means_SF = torch.cat([own["means"] for own in self.own])
        centre_F = means_SF.mean(dim=0)
        lower_FF = torch.linalg.cholesky(self._covariance(self.shared)[0])
        identity_FF = torch.eye(len(lower_FF), dtype=torch.float64)
        whitening_FF = torch.linalg.solve_triangular(lower_FF, identity_FF, upper=False).T
        parts = (centre_F, whitening_FF, (means_SF - centre_F) @ whitening_FF)
        return *(part.to(device, torch.float32) for part in parts), [len(own["means"]) for own in self.own]

    def decision_function(self, features_BF: Tensor) -> Tensor:
        centre_F, whitening_FF, means_SF, components = self.prepared(features_BF.device)
        with torch.autocast(features_BF.device.type, enabled=False):
            white_BF = (features_BF.float() - centre_F) @ whitening_FF
            # |x|^2 is the same for all components; taken last, it does not blur their differences
            fits_BS = white_BF @ means_SF.T - 0.5 * means_SF.square().sum(dim=1)
            best_BT = torch.stack(
                [
                    fits_BC.logsumexp(dim=1) - math.log(fits_BC.shape[1])
                    for fits_BC in fits_BS.split(components, dim=1)
                ],
                dim=1,
            )
            return best_BT - 0.5 * white_BF.square().sum(dim=1, keepdim=True)
