"""Ridge regression on random features: closed form, from a Gram matrix.

Shapes: B images, K images kept for calibration, F features, M random features, C classes of a task, S targets of all
tasks (tasks or classes), T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .features import FeatureSource
from .incremental import IncrementalSelector, State


class RidgeSelector(IncrementalSelector):
    """Ridge regression from a random ReLU projection of the features to the tasks, or to their classes.

    What it keeps are the Gram matrix of the projected features, in float64, and their sums over each task or class; so
    tasks are added without old images, to what one regression on all images gives. The idea is that of RanPAC
    (arXiv 2307.02251), and of RAIL (arXiv 2406.18868) for tasks that nobody names.

    A task's score is its regression output, about 1 for its own images; with classes the largest of theirs.

    Args:
        source, reject_rate, held_out, per_batch, seed, calibration: see `IncrementalSelector`. The projection is drawn
            by the seed and stored as that.
        projection: random features M. The Gram matrix takes 8 M^2 bytes.
        labels: what is regressed on: "tasks", or "classes", which needs labels.
        ridges: to choose from, by the squared error on the images kept for calibration; times the mean diagonal of the
            Gram matrix, so that the features' scale does not matter.
        none_by: how an image is found to be none of the tasks': by its "leverage", `h (G + ridge)^-1 h` for the random
            features h and the Gram matrix G, which is large where no images were; or by the best "score".
    """

    kind = "ridge"
    own_names = (*IncrementalSelector.kept_names, "images", "sums")
    shared_names = ("gram",)

    def __init__(
        self,
        source: FeatureSource | None = None,
        *,
        projection: int = 1024,
        labels: Literal["tasks", "classes"] = "tasks",
        ridges: Sequence[float] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        none_by: Literal["leverage", "score"] = "leverage",
        **options: Any,
    ):
        super().__init__(source, **options)
        if projection < 1:
            raise ValueError(f"`projection` must be at least 1 random feature, got {projection}.")
        if labels not in ("tasks", "classes"):
            raise ValueError(f"`labels` must be 'tasks' or 'classes', got {labels!r}.")
        if not ridges or min(ridges) <= 0:
            raise ValueError(f"`ridges` must be positive, at least one; got {list(ridges)}.")
        if none_by not in ("leverage", "score"):
            raise ValueError(f"`none_by` must be 'leverage' or 'score', got {none_by!r}.")
        self.none_by = none_by
        self.projection = projection
        self.labels = labels
        self.ridges = tuple(ridges)

    def options(self) -> dict[str, Any]:
        further = {"projection": self.projection, "labels": self.labels, "ridges": list(self.ridges)}
        return {**super().options(), **further, "none_by": self.none_by}

    @property
    def needs_labels(self) -> bool:
        return self.labels == "classes"

    def _projection(self, width: int) -> Tensor:
        draw = np.random.default_rng([self.seed, 2])
        return torch.from_numpy(draw.standard_normal((width, self.projection))) / width**0.5

    def project(self, x_BF: Tensor) -> Tensor:
        """Return the random features B x M of features, in their precision."""
        return (x_BF @ self._projection(x_BF.shape[1]).to(x_BF)).relu()

    def _empty_sums(self, width: int) -> State:
        return {"sums": torch.zeros(1, self.projection, dtype=torch.float64)}

    def _absorb(self, own: State, shared: State, x_BF: Tensor, labels_B: Tensor) -> tuple[State, State]:
        x_BM = self.project(x_BF)
        targets_B = labels_B if self.needs_labels else torch.zeros_like(labels_B)
        classes = max(int(targets_B.max()) + 1, len(own["sums"]))
        sums_CM = F.one_hot(targets_B, classes).double().T @ x_BM
        sums_CM[: len(own["sums"])] += own["sums"]
        gram_MM = x_BM.T @ x_BM
        if shared:
            gram_MM += shared["gram"]
        return {**own, "sums": sums_CM}, {"gram": gram_MM}

    @torch.no_grad()
    def solve(self) -> tuple[Tensor, float]:
        """Solve the regression: weights M x S in float64, and the ridge that was chosen, times the mean diagonal."""
        sums_SM = torch.cat([own["sums"] for own in self.own])
        kept = [self.project(own["kept"].double()) for own in self.own]
        starts = np.cumsum([0, *(len(own["sums"]) for own in self.own)])
        rows = [
            start
            + (own["kept_labels"].clamp_max(len(own["sums"]) - 1) if self.needs_labels else 0 * own["kept_labels"])
            for start, own in zip(starts, self.own, strict=False)
        ]
        kept_KM, targets_KS = torch.cat(kept), F.one_hot(torch.cat(rows), len(sums_SM)).double()
        scale = self.shared["gram"].diagonal().mean().item() or 1.0
        best = None
        for ridge in sorted(self.ridges, reverse=True):
            weights_MS = torch.cholesky_solve(sums_SM.T, torch.linalg.cholesky(self._regular(ridge * scale)))
            error = (kept_KM @ weights_MS - targets_KS).square().sum().item()
            if best is None or error < best[0]:
                best = error, weights_MS, ridge * scale
        return best[1:]

    def _regular(self, ridge: float) -> Tensor:
        return self.shared["gram"] + ridge * torch.eye(self.projection, dtype=torch.float64)

    def _prepare(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        weights_MS, ridge = self.solve()
        lower_MM = torch.linalg.cholesky(self._regular(ridge))
        parts = (self._projection(self.width), weights_MS, lower_MM)
        targets_T = torch.tensor([len(own["sums"]) for own in self.own])
        task_S = torch.arange(len(self.own)).repeat_interleave(targets_T)
        return *(part.to(device, torch.float32) for part in parts), task_S.to(device), len(self.own)

    def decision_function(self, features_BF: Tensor) -> Tensor:
        projection_FM, weights_MS, _, task_S, tasks = self.prepared(features_BF.device)
        with torch.autocast(features_BF.device.type, enabled=False):
            outputs_BS = (features_BF.float() @ projection_FM).relu() @ weights_MS
            if len(task_S) == tasks:  # one target each
                return outputs_BS
            lowest_BT = outputs_BS.new_full((len(outputs_BS), tasks), -torch.inf)
            return lowest_BT.scatter_reduce(1, task_S.expand_as(outputs_BS), outputs_BS, "amax")

    def known(self, features_BF: Tensor, scores_BT: Tensor) -> Tensor:
        if self.none_by == "score":
            return scores_BT
        projection_FM, _, lower_MM, *_ = self.prepared(features_BF.device)
        with torch.autocast(features_BF.device.type, enabled=False):
            x_MB = (features_BF.float() @ projection_FM).relu().T
            leverage_B = torch.linalg.solve_triangular(lower_MM, x_MB, upper=False).square().sum(dim=0)
        return -leverage_B[:, None].expand_as(scores_BT)
