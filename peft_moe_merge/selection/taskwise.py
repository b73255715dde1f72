"""Selectors that learn a task once, from all its images.

Shapes: B images, N held-out images, F features, C classes of a task, P projection width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .base import Batches, Selector


class TaskwiseSelector(Selector):
    """A selector whose tasks are fitted once each; thresholds are set from held-out images when their task is fitted."""

    @torch.no_grad()
    def fit(self, task: str, features: Batches, texts_CP: Tensor | None = None) -> None:
        self._check_new(task)
        held_out: list[Tensor] = []
        batches = self._training_part(task, features, held_out)
        before = self.own, self.shared, self.tasks, self.width
        try:
            own, shared = self._learn(task, batches, texts_CP)
            self._add(task, own, shared, held_out)
        except BaseException:
            self.own, self.shared, self.tasks, self.width = before
            raise
        finally:
            self._prepared = {}

    def _add(self, task: str, own: dict[str, Tensor], shared: dict[str, Tensor], held_out: list[Tensor]) -> None:
        self.own = [*self.own, own]
        self.shared = shared
        self.tasks = [*self.tasks, task]
        self._prepared = {}
        levels = [-math.inf, -math.inf, 0.0]
        if self.reject_rate > 0:
            held_out_NF = torch.cat(held_out)
            self._warn_of_few(task, len(held_out_NF))
            if len(held_out_NF):
                own_scores_N = self.decision_function(held_out_NF)[:, -1].double()
                # the order statistic itself: what lies between two of few values is nobody's score
                quantile = own_scores_N.quantile(self.reject_rate, interpolation="lower").item()
                levels = [quantile, own_scores_N.mean().item(), float(len(held_out_NF))]
        own["threshold"] = torch.tensor(levels, dtype=torch.float64)

    def _training_part(
        self, task: str, features: Batches, held_out: list[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        # numpy draws the same numbers however many are asked for at once, so batching does not matter
        draw = np.random.default_rng([self.seed, len(self.tasks)])
        images = 0
        for batch in [features] if isinstance(features, Tensor) else features:
            features_BF, labels_B = batch if isinstance(batch, tuple | list) else (batch, None)
            self._check(features_BF, f"of task {task!r}")
            self.width = features_BF.shape[1]
            images += len(features_BF)
            out_B = torch.from_numpy(draw.random(len(features_BF)) < self.held_out).to(features_BF.device)
            held_out.append(features_BF[out_B].float())
            if not out_B.all():
                yield features_BF[~out_B], None if labels_B is None else labels_B[~out_B.to(labels_B.device)]
        if sum(map(len, held_out)) == images:
            raise ValueError(
                f"Task {task!r} has {images} images to fit with, of which {images} are held out: give more images."
            )

    @abstractmethod
    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Learn from batches of (features, labels): return what to keep of the task, and what all tasks now share."""
