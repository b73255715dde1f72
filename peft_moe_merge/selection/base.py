"""What every selector is: it learns task by task, scores all tasks, and says "none of them" below a threshold.

Shapes: B images, F features, T tasks, A allowed tasks, C classes of a task, P projection width.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .features import FeatureSource, ImageFeatures

NONE = -1
"""The id of images that belong to none of the tasks: plain CLIP takes them."""

Batches = Tensor | Iterable[Tensor | tuple[Tensor, Tensor]]
"""All features of a task, N x F, or batches of them; or batches of (features, labels)."""


def decide(
    scores_BT: Tensor, bars_BT: Tensor, per_batch: bool = False, allowed: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the best scored task, or none of them if its score does not reach the task's bar.

    Args:
        scores_BT: how well each task fits each image, the higher the better.
        bars_BT: what a task's score must reach; -inf accepts everything.
        per_batch: decide once for the whole batch, by mean scores; the bars should then be those of a mean.
        allowed: the tasks to choose from, at least one; None allows all.

    Returns:
        task_ids_B (int64; -1 for none), and margins_B: by how much the best score exceeds its bar, so that negative
        values mean none.
    """
    images = len(scores_BT)
    if per_batch:
        scores_BT, bars_BT = (values_BT.mean(dim=0, keepdim=True) for values_BT in (scores_BT, bars_BT))
    if allowed is None:
        best_B = scores_BT.argmax(dim=1)
    else:
        allowed_A = torch.tensor(sorted(allowed), device=scores_BT.device)
        best_B = allowed_A[scores_BT[:, allowed_A].argmax(dim=1)]
    margins_B = (scores_BT - bars_BT).gather(1, best_B[:, None])[:, 0]
    task_ids_B = best_B.where(margins_B >= 0, NONE)
    return task_ids_B.expand(images), margins_B.expand(images)


class Selector(ABC):
    """Chooses a task for each image from its frozen features.

    A task is fitted from its own images alone. A part of them, drawn by the seed, is held out of the fit: the
    task's threshold is the quantile `reject_rate` of their scores for it, so that about this share of a task's own
    images is taken for "none of them". The mean of B scores lies nearer to the mean of the N held-out ones, by
    `sqrt(1 / B + 1 / N)`; so the threshold of a batch does.

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
    integer_names: ClassVar[tuple[str, ...]] = ()

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
        self._levels: tuple[list[Tensor], Tensor] = ([], torch.empty(0))  # the thresholds put together, and what of

    def options(self) -> dict[str, Any]:
        """Return the arguments, except the source, that make an equal selector without tasks."""
        names = ("reject_rate", "held_out", "per_batch", "seed")
        return {name: getattr(self, name) for name in names}

    # --------------------------------------------------------------------------------------------------------- fitting

    @abstractmethod
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

    def _check_new(self, task: str) -> None:
        if task in self.tasks:
            raise ValueError(f"Task {task!r} is fitted already. Fitted: {self.tasks}. Each task is fitted once.")

    def _warn_of_few(self, task: str, held_out: int) -> None:
        if held_out * self.reject_rate < 1 and self.reject_rate > 0:
            warnings.warn(
                f"The threshold of task {task!r} rests on {held_out} held-out images, too few for "
                f"reject_rate={self.reject_rate}: expect another rate. Raise `held_out` or give more images.",
                stacklevel=5,
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

    # ------------------------------------------------------------------------------------------------------- selecting

    @torch.no_grad()
    def select(
        self, features_BF: Tensor, allowed: Sequence[int] | None = None, may_be_none: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Choose a task for each image.

        Per image the choice does not depend on the other images of the batch; with `per_batch` it is one for all.

        Args:
            features_BF: of the images.
            allowed: ids of the tasks to choose from, at least one; None allows all.
            may_be_none: False takes the best task whatever its score, for images that are known to be from one.

        Returns:
            task_ids LongTensor[B], positions in `tasks` or -1 for none of them; and scores FloatTensor[B, T], the
            higher the better.

        Raises:
            RuntimeError: nothing has been fitted yet.
            ValueError: features are NaN, infinite or of another width than those fitted; no such tasks.
        """
        if allowed is not None and (not allowed or not set(allowed) <= set(range(len(self.tasks)))):
            raise ValueError(
                f"`allowed` must be ids of the {len(self.tasks)} tasks, at least one; got {list(allowed)}."
            )
        scores_BT, bars_BT = self.judge(features_BF, len(features_BF) if self.per_batch else 1)
        if not may_be_none:
            bars_BT = torch.full_like(bars_BT, -torch.inf)
        task_ids_B, _ = decide(scores_BT, bars_BT, self.per_batch, allowed)
        return task_ids_B, scores_BT

    def predict(self, features_BF: Tensor) -> Tensor:
        """Return the task ids of `select`: LongTensor[B]."""
        return self.select(features_BF)[0]

    @torch.no_grad()
    def judge(self, features_BF: Tensor, together: int = 1) -> tuple[Tensor, Tensor]:
        """Return what a decision is made of, for `decide`: scores and bars, both B x T. Raises what `select` raises.

        Args:
            features_BF: of the images.
            together: how many images a decision will be made for at once; the bars are those of a mean of so many.
        """
        if not self.tasks:
            raise RuntimeError("The selector knows no task yet: call `fit(task, features)` first.")
        self._check(features_BF, "to select by")
        scores_BT = self.decision_function(features_BF)
        return scores_BT, self.bars(features_BF, scores_BT, together)

    @abstractmethod
    def decision_function(self, features_BF: Tensor) -> Tensor:
        """Score every task for every image: B x T, float32."""

    def bars(self, features_BF: Tensor, scores_BT: Tensor, together: int = 1) -> Tensor:
        """Return what the scores, or the means of `together` ones, must reach: B x T."""
        return self.thresholds(together).to(scores_BT.device, torch.float32).expand_as(scores_BT)

    def thresholds(self, together: int = 1) -> Tensor:
        """Return each task's threshold for the mean score of so many images: DoubleTensor[T]."""
        kept = [own["threshold"] for own in self.own]
        before, levels_T3 = self._levels
        if len(kept) != len(before) or any(map(operator.is_not, kept, before)):
            # a file of the first release has the quantile alone: nothing to scale by
            whole = [level.flatten() for level in kept]
            whole = [level if len(level) > 1 else torch.cat([level, level, torch.ones_like(level)]) for level in whole]
            levels_T3 = torch.stack(whole)
            self._levels = kept, levels_T3
        quantile_T, mean_T, images_T = levels_T3.unbind(dim=1)
        scale_T = ((1 / max(together, 1) + 1 / images_T) / (1 + 1 / images_T)).sqrt()
        return (mean_T + (quantile_T - mean_T) * scale_T).where(quantile_T.isfinite(), quantile_T)

    def scores(self, features_BF: Tensor) -> Tensor:
        """Return `decision_function(features_BF)`, by the name it had first."""
        return self.decision_function(features_BF)

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
