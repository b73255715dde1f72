"""What every selector is: it learns task by task, scores all tasks, and says "none of them" below a threshold.

Shapes: B images, F features, T tasks, C classes of a task, P projection width.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .features import FeatureSource, ImageFeatures

NONE = -1
"""The id of images that belong to none of the tasks: plain CLIP takes them."""

Batches = Tensor | Iterable[Tensor | tuple[Tensor, Tensor]]
"""All features of a task, N x F, or batches of them; or batches of (features, labels)."""


def decide(scores_BT: Tensor, bars_BT: Tensor, per_batch: bool = False) -> tuple[Tensor, Tensor]:
    """Choose the best scored task, or none of them if its score does not reach the task's bar.

    Args:
        scores_BT: how well each task fits each image, the higher the better.
        bars_BT: what a task's score must reach; -inf accepts everything.
        per_batch: decide once for the whole batch, by mean scores.

    Returns:
        task_ids_B (int64; -1 for none), and margins_B: by how much the best score exceeds its bar, so that negative
        values mean none.
    """
    images = len(scores_BT)
    if per_batch:
        scores_BT, bars_BT = (values_BT.mean(dim=0, keepdim=True) for values_BT in (scores_BT, bars_BT))
    best_B = scores_BT.argmax(dim=1)
    margins_B = (scores_BT - bars_BT).gather(1, best_B[:, None])[:, 0]
    task_ids_B = best_B.where(margins_B >= 0, NONE)
    return task_ids_B.expand(images), margins_B.expand(images)


class Selector(ABC):
    """Chooses a task for each image from its frozen features.

    A task is fitted once, from its own images alone. A part of them, drawn by the seed, is held out of the fit: the
    task's threshold is the quantile `reject_rate` of their scores for it, so that about this share of a task's own
    images is taken for "none of them".

    Args:
        source: where features come from once the selector is attached to a model; `ImageFeatures()` if None.
        reject_rate: share of a task's own images that may be rejected, in [0, 1); 0 never rejects.
        held_out: share of the training images kept for the threshold, in (0, 1).
        per_batch: decide once per batch, for batches known to come from one task. It makes choosing far easier, so
            say so wherever you report a number.
        seed: of everything random.

    Attributes:
        tasks: fitted, in order; an id is a position in this list.
        own: what is kept of each task, by name.
        shared: what all tasks share.

    Raises:
        ValueError: for settings out of range.
    """

    kind: ClassVar[str]
    own_names: ClassVar[tuple[str, ...]]
    shared_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        source: FeatureSource | None = None,
        *,
        reject_rate: float = 0.05,
        held_out: float = 0.1,
        per_batch: bool = False,
        seed: int = 0,
    ):
        if not 0 <= reject_rate < 1:
            raise ValueError(f"`reject_rate` is a share of images, in [0, 1); got {reject_rate}.")
        if not 0 < held_out < 1:
            raise ValueError(f"`held_out` is a share of the training images, in (0, 1); got {held_out}.")
        self.source = source or ImageFeatures()
        self.reject_rate = reject_rate
        self.held_out = held_out
        self.per_batch = per_batch
        self.seed = seed
        self.tasks: list[str] = []
        self.width: int | None = None
        self.own: list[dict[str, Tensor]] = []
        self.shared: dict[str, Tensor] = {}
        self._prepared: dict[torch.device, Any] = {}

    def options(self) -> dict[str, Any]:
        """Return the arguments, except the source, that make an equal selector without tasks."""
        names = ("reject_rate", "held_out", "per_batch", "seed")
        return {name: getattr(self, name) for name in names}

    # --------------------------------------------------------------------------------------------------------- fitting

    @torch.no_grad()
    def fit(self, task: str, features: Batches, texts_CP: Tensor | None = None) -> None:
        """Learn a new task, in one pass over its training images. The result does not depend on how they are batched.

        Nothing changes if this raises.

        Args:
            task: its name.
            features: of all its training images, as one tensor or as batches, with labels where the selector needs
                them.
            texts_CP: frozen text embeddings of the task's classes, for `TextSelector`.

        Raises:
            ValueError: the task is known already; there are no images; features are NaN, infinite or of another width
                than those of earlier tasks; labels or texts are missing that this selector needs.
        """
        if task in self.tasks:
            raise ValueError(f"Task {task!r} is fitted already. Fitted: {self.tasks}. Each task is fitted once.")
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
        threshold = -math.inf
        if self.reject_rate > 0:
            held_out_NF = torch.cat(held_out)
            if len(held_out_NF) * self.reject_rate < 1:
                warnings.warn(
                    f"The threshold of task {task!r} rests on {len(held_out_NF)} held-out images, too few for "
                    f"reject_rate={self.reject_rate}: expect another rate. Raise `held_out` or give more images.",
                    stacklevel=4,
                )
            if len(held_out_NF):
                own_scores_N = self.scores(held_out_NF)[:, -1].double()
                # the order statistic itself: what lies between two of few values is nobody's score
                threshold = own_scores_N.quantile(self.reject_rate, interpolation="lower").item()
        own["threshold"] = torch.tensor(threshold, dtype=torch.float64)

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

    def _check(self, features_BF: Tensor, whose: str) -> None:
        if not isinstance(features_BF, Tensor) or features_BF.ndim != 2 or not features_BF.dtype.is_floating_point:
            got = f"{tuple(features_BF.shape)} {features_BF.dtype}" if isinstance(features_BF, Tensor) else features_BF
            raise ValueError(f"Features {whose} must be a floating point tensor of shape (images, width), got {got}.")
        if self.width is not None and features_BF.shape[1] != self.width:
            raise ValueError(
                f"Features {whose} have width {features_BF.shape[1]}, but the selector was fitted with width "
                f"{self.width} ({self.source}): take features of the same source and model."
            )
        if not features_BF.isfinite().all():
            rows = (~features_BF.isfinite().all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"Features {whose} are NaN or infinite for {len(rows)} of {len(features_BF)} images (rows {rows[:5]}): "
                "check the images and the precision that they are encoded in."
            )

    @abstractmethod
    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Learn from batches of (features, labels): return what to keep of the task, and what all tasks now share."""

    # ------------------------------------------------------------------------------------------------------- selecting

    @torch.no_grad()
    def select(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Choose a task for each image.

        Per image the choice does not depend on the other images of the batch; with `per_batch` it is one for all.

        Returns:
            task_ids LongTensor[B], positions in `tasks` or -1 for none of them; and scores FloatTensor[B, T], the
            higher the better.

        Raises:
            RuntimeError: nothing has been fitted yet.
            ValueError: features are NaN, infinite or of another width than those fitted.
        """
        scores_BT, bars_BT = self.judge(features_BF)
        task_ids_B, _ = decide(scores_BT, bars_BT, self.per_batch)
        return task_ids_B, scores_BT

    @torch.no_grad()
    def judge(self, features_BF: Tensor) -> tuple[Tensor, Tensor]:
        """Return what a decision is made of, for `decide`: scores and bars, both B x T. Raises what `select` raises."""
        if not self.tasks:
            raise RuntimeError("The selector knows no task yet: call `fit(task, features)` first.")
        self._check(features_BF, "to select by")
        return self.scores(features_BF), self.bars(features_BF)

    @abstractmethod
    def scores(self, features_BF: Tensor) -> Tensor:
        """Score every task for every image: B x T, float32."""

    def bars(self, features_BF: Tensor) -> Tensor:
        """Return what the scores must reach: B x T."""
        bars_T = torch.stack([own["threshold"] for own in self.own]).to(features_BF.device, torch.float32)
        return bars_T.expand(len(features_BF), -1)

    def prepared(self, device: torch.device) -> Any:
        """Return what scoring needs on a device, made once after each fit."""
        if device not in self._prepared:
            self._prepared[device] = self._prepare(device)
        return self._prepared[device]

    def _prepare(self, device: torch.device) -> Any:
        return [{name: tensor.to(device) for name, tensor in own.items()} for own in self.own]

    # --------------------------------------------------------------------------------------------------------- storage

    @property
    def bytes_per_task(self) -> int:
        """How many bytes the latest task added."""
        return sum(tensor.nbytes for tensor in self.own[-1].values()) if self.own else 0

    @property
    def shared_bytes(self) -> int:
        """How many bytes all tasks share."""
        return sum(tensor.nbytes for tensor in self.shared.values())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source}, tasks={self.tasks})"
