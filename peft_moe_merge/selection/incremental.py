"""Selectors that are made of sums: images in any order and any batches, of any task at any time, to the same result.

Shapes: B images, K images kept for calibration, F features, T tasks, R routes (the tasks, then none of them).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import NONE, Batches, Selector
from .features import FeatureSource

State = dict[str, Tensor]

PREPARING = threading.RLock()
"""Held while a selector is made ready to score; the one for all, so that selectors can be copied."""

UNKNOWN = 0.2
"""How likely an image is of none of the tasks although it reaches the threshold of one."""


class IncrementalSelector(Selector):
    """A selector whose state is sums over images, and the features of a few held-out images per task.

    Which images are held out depends on the images alone: each draws a number in [0, 1) from its own features and the
    seed. Those below `held_out` may be kept, of each task the `calibration` ones with the smallest numbers; all others
    enter the sums. Regularization and thresholds are chosen on the images kept, anew whenever a task has joined. So
    the result depends neither on the order of images and tasks nor on batches, and old images are never needed.

    Args:
        source, reject_rate, held_out, per_batch, seed: see `Selector`.
        calibration: how many images of a task are kept at most, by their features; 4 F bytes each.
        thresholds_by: "task", so that of each task about the same share is rejected; or "all", one threshold for the
            best fit of all tasks, so that about this share is rejected of all together, but more of some tasks.

    Raises:
        ValueError: for settings out of range.
    """

    temperature: float = 1.0
    kept_names = ("kept", "kept_draws", "kept_labels")
    integer_names = ("kept_labels", "images")

    def __init__(
        self,
        source: FeatureSource | None = None,
        *,
        calibration: int = 128,
        thresholds_by: Literal["task", "all"] = "task",
        **options: Any,
    ):
        super().__init__(source, **options)
        if calibration < 1:
            raise ValueError(f"`calibration` must be at least 1 image per task, got {calibration}.")
        if thresholds_by not in ("task", "all"):
            raise ValueError(f"`thresholds_by` must be 'task' or 'all', got {thresholds_by!r}.")
        self.calibration = calibration
        self.thresholds_by = thresholds_by
        self._in_calibration: Any = None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "calibration": self.calibration, "thresholds_by": self.thresholds_by}

    # --------------------------------------------------------------------------------------------------------- fitting

    def fit(self, task: str, features: Batches, texts_CP: Tensor | None = None) -> None:
        self._check_new(task)
        before = self.own, self.shared, self.tasks, self.width
        try:
            for batch in [features] if isinstance(features, Tensor) else features:
                self.partial_fit(task, *(batch if isinstance(batch, tuple | list) else (batch,)))
            fitted = int(self.own[-1]["images"]) if task in self.tasks else 0
            if not fitted:
                held_out = len(self.own[-1]["kept"]) if task in self.tasks else 0
                raise ValueError(
                    f"Task {task!r} has {held_out} images to fit with, of which {held_out} are held out: give more "
                    "images."
                )
        except BaseException:
            self.own, self.shared, self.tasks, self.width = before
            self._prepared = {}
            raise
        self._warn_of_few(task, len(self.own[-1]["kept"]))

    @torch.no_grad()
    def partial_fit(self, task: str, features_BF: Tensor, labels_B: Tensor | None = None) -> None:
        """Add images to a task, known or new. Nothing changes if this raises.

        Args:
            task: its name.
            features_BF: of the images.
            labels_B: their classes within the task, where the selector needs them.

        Raises:
            ValueError: features are NaN, infinite or of another width than those before; labels are missing that this
                selector needs, or are not one per image.
        """
        self._check(features_BF, f"of task {task!r}")
        if labels_B is None:
            if self.needs_labels:
                raise ValueError(f"{type(self).__name__} needs labels: pass batches of (features, labels).")
            labels_B = torch.zeros(len(features_BF), dtype=torch.int64)
        if labels_B.shape != features_BF.shape[:1]:
            raise ValueError(
                f"{len(features_BF)} images of task {task!r} with labels of shape {tuple(labels_B.shape)}."
            )
        features_BF, labels_B = features_BF.detach().cpu(), labels_B.detach().cpu()
        position = self.tasks.index(task) if task in self.tasks else len(self.tasks)
        old = self.own[position] if position < len(self.own) else self._empty(features_BF.shape[1])
        draws_B = self._draws(features_BF)
        held_B = draws_B < self.held_out
        features = torch.cat([old["kept"], features_BF[held_B].float()])
        draws, labels = (
            torch.cat([old["kept_draws"], draws_B[held_B]]),
            torch.cat([old["kept_labels"], labels_B[held_B]]),
        )
        order = draws.argsort(stable=True)
        keep, rest = order[: self.calibration], order[self.calibration :]
        new = {**old, "kept": features[keep], "kept_draws": draws[keep], "kept_labels": labels[keep]}
        shared = self.shared
        x_BF = torch.cat([features_BF[~held_B].float(), features[rest]]).double()
        if len(x_BF):
            new, shared = self._absorb(new, shared, x_BF, torch.cat([labels_B[~held_B], labels[rest]]))
            new["images"] = old["images"] + len(x_BF)
        if position == len(self.tasks):
            self.tasks = [*self.tasks, task]
        self.own = [*self.own[:position], new, *self.own[position + 1 :]]
        self.shared, self.width, self._prepared = shared, features_BF.shape[1], {}

    def _draws(self, features_BF: Tensor) -> Tensor:
        """Draw a number in [0, 1) for each image: where it lies along a random direction, in hundredths, modulo one."""
        direction_F = np.random.default_rng([self.seed, 1]).standard_normal(features_BF.shape[1])
        x_BF = features_BF.double()
        places_B = x_BF @ torch.from_numpy(direction_F) / x_BF.norm(dim=1).clamp_min(1e-300)
        return (100 * places_B).remainder(1.0)

    def _empty(self, width: int) -> State:
        empty = {
            "kept": torch.zeros(0, width),
            "kept_draws": torch.zeros(0, dtype=torch.float64),
            "kept_labels": torch.zeros(0, dtype=torch.int64),
            "images": torch.zeros((), dtype=torch.int64),
            "threshold": torch.tensor([-torch.inf, -torch.inf, 0.0], dtype=torch.float64),
        }
        return empty | self._empty_sums(width)

    @property
    @abstractmethod
    def needs_labels(self) -> bool:
        """Whether images must come with labels."""

    @abstractmethod
    def _empty_sums(self, width: int) -> State:
        """Return a task's sums over no images."""

    @abstractmethod
    def _absorb(self, own: State, shared: State, x_BF: Tensor, labels_B: Tensor) -> tuple[State, State]:
        """Add images (float64) of one task to the sums: return the task's and the shared ones, both new."""

    # ------------------------------------------------------------------------------------------------------- selecting

    def known(self, features_BF: Tensor, scores_BT: Tensor) -> Tensor:
        """Return how well each image fits what is known of each task, the higher the better: B x T.

        This is what thresholds are for; the scores themselves unless a selector has something better.
        """
        return scores_BT

    def bars(self, features_BF: Tensor, scores_BT: Tensor, together: int = 1) -> Tensor:
        known_BT = self.known(features_BF, scores_BT)
        return scores_BT - known_BT + super().bars(features_BF, scores_BT, together)

    def prepared(self, device: torch.device) -> Any:
        made = self._prepared.get(device)
        if made is None:
            with PREPARING, torch.autocast(device.type, enabled=False):
                # what another thread finds prepared must be calibrated, too
                made = self._prepared.get(device) or self._in_calibration
                if made is None:
                    made = self._in_calibration = self._prepare(device)
                    try:
                        if not self._prepared:
                            self._calibrate(device)
                    finally:
                        self._in_calibration = None
                    self._prepared[device] = made
        return made

    @torch.no_grad()
    def posterior(
        self,
        features_BF: Tensor,
        allowed: Sequence[int] | None = None,
        may_be_none: bool = True,
        unknown: float = UNKNOWN,
    ) -> Tensor:
        """Return how likely each image is from each task, or from none of them.

        An image that `select` takes for none is of none. Otherwise the tasks have `softmax(temperature * scores)`, with the
        temperature that fits the images kept best, tasks alike, less the share that is none's.

        Args:
            features_BF, allowed, may_be_none: see `select`.
            unknown: how likely an image is of none although it reaches the threshold, in [0, 1). There are no images of
                no task to learn it from; it is a prior.

        Returns:
            B x (T + 1), float32, the last for none; rows add up to 1.

        Raises:
            RuntimeError, ValueError: what `select` raises; `unknown` out of range.
        """
        if not 0 <= unknown < 1:
            raise ValueError(f"`unknown` must lie in [0, 1), got {unknown}.")
        task_ids_B, scores_BT = self.select(features_BF, allowed, may_be_none)
        if allowed is not None:
            ruled_out = [task for task in range(len(self.tasks)) if task not in allowed]
            scores_BT = scores_BT.index_fill(1, torch.tensor(ruled_out, device=scores_BT.device).long(), -torch.inf)
        likely_BT = (self.temperature * scores_BT).softmax(dim=1)
        none_B = (task_ids_B == NONE).to(likely_BT).clamp_min(unknown if may_be_none else 0.0)[:, None]
        return torch.cat([likely_BT * (1 - none_B), none_B], dim=1)

    @torch.no_grad()
    def _calibrate(self, device: torch.device) -> None:
        """Set the temperature and all thresholds from the images kept."""
        scores = [self.decision_function(own["kept"].to(device)) for own in self.own]
        own_task = [torch.full((len(scores_KT),), task) for task, scores_KT in enumerate(scores)]
        self.temperature = best_temperature([scores_KT.double().cpu() for scores_KT in scores], own_task)
        if self.reject_rate == 0:
            return
        known = [
            self.known(own["kept"].to(device), scores_KT)[:, position].double().cpu()
            for position, (own, scores_KT) in enumerate(zip(self.own, scores, strict=True))
        ]
        for own, known_K in zip(self.own, known, strict=True):
            of = known_K if self.thresholds_by == "task" else torch.cat(known)
            if len(known_K):
                quantile = of.quantile(self.reject_rate, interpolation="lower")
                own["threshold"] = torch.stack([quantile, known_K.mean(), known_K.new_tensor(len(known_K))])


def best_temperature(scores: Sequence[Tensor], labels: Sequence[Tensor]) -> float:
    """Find what to multiply scores by so that their softmax fits best: least cross-entropy, tasks alike.

    Args:
        scores: of each task's own images, K x C.
        labels: the right columns, K.

    Returns:
        One of 121 values between 1e-3 and 1e3; 1 where there are no images.
    """
    if not any(map(len, scores)):
        return 1.0
    temperatures = torch.logspace(-3, 3, 121, dtype=torch.float64)
    losses = torch.zeros(len(temperatures), dtype=torch.float64)
    for scores_KC, labels_K in zip(scores, labels, strict=True):
        if len(scores_KC):
            losses += torch.stack([F.cross_entropy(temperature * scores_KC, labels_K) for temperature in temperatures])
    return temperatures[losses.argmin()].item()
