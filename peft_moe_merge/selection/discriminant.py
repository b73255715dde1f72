"""Regularized discriminant analysis: a Gaussian per task or class, between linear and quadratic.

Shapes: B images, K images kept for calibration, F features, C components of a task, S of all tasks, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import TOKENS, Depths, FeatureSource, vision_tower
from .incremental import IncrementalSelector, State, best_temperature
from .moments import Moments

TEMPERATURES = torch.logspace(-4, 1, 21, dtype=torch.float64)
NO_SAY = 1e-3
"""How far the logarithms of classes may lie apart where no image could be kept to find a temperature by."""


@dataclass(frozen=True)
class Component:
    """What scoring one task needs: `whitening_FF` makes its distances Euclidean, from `centre_F` on."""

    centre_F: Tensor
    whitening_FF: Tensor
    means_CF: Tensor
    constant: float

    def to(self, device: torch.device, dtype: torch.dtype) -> Component:
        moved = (part.to(device, dtype) for part in (self.centre_F, self.whitening_FF, self.means_CF))
        return Component(*moved, self.constant)

    def whitened(self, features_BF: Tensor) -> Tensor:
        """Return the images where distances are Euclidean: B x F."""
        return (features_BF - self.centre_F) @ self.whitening_FF

    def log_density(self, features_BF: Tensor) -> Tensor:
        """Return the logarithm of the density of each image, up to what is the same for all tasks: B."""
        white_BF = self.whitened(features_BF)
        # |x|^2 is the same for all components; taken last, it does not blur their differences
        fits_BC = fits(white_BF, self.means_CF)
        return fits_BC.logsumexp(dim=1) - 0.5 * white_BF.square().sum(dim=1) + self.constant


def fits(white_BF: Tensor, means_CF: Tensor) -> Tensor:
    """Return the logarithms of the densities of each image under Gaussians, up to what is the same for all: B x C."""
    return white_BF @ means_CF.T - 0.5 * means_CF.square().sum(dim=1)


def component(means_CF: Tensor, covariance_FF: Tensor) -> Component:
    """Make the mixture of equally likely Gaussians with these means and one covariance."""
    lower_FF = torch.linalg.cholesky(covariance_FF)
    identity_FF = torch.eye(len(lower_FF), dtype=lower_FF.dtype)
    whitening_FF = torch.linalg.solve_triangular(lower_FF, identity_FF, upper=False).T
    centre_F = means_CF.mean(dim=0)
    constant = -lower_FF.diagonal().log().sum().item() - math.log(len(means_CF))
    return Component(centre_F, whitening_FF, (means_CF - centre_F) @ whitening_FF, constant)


class Separate:
    """The mixtures of all tasks, each with a covariance of its own.

    Args:
        components: one a task.
    """

    def __init__(self, components: Sequence[Component]):
        self.components = components

    def to(self, device: torch.device, dtype: torch.dtype) -> Separate:
        return Separate([one.to(device, dtype) for one in self.components])

    def log_densities(self, features_BF: Tensor) -> Tensor:
        """Return the logarithm of each task's density at each image, up to what is the same for all: B x T."""
        return torch.stack([one.log_density(features_BF) for one in self.components], dim=1)

    def class_fits(self, features_BF: Tensor, task: int) -> Tensor:
        """Return the same of each component of a task, up to what these have in common: B x C."""
        one = self.components[task]
        return fits(one.whitened(features_BF), one.means_CF)


class Common:
    """The same where all tasks have one covariance: images are whitened once, and a task costs its means alone.

    Args:
        everything: the components of all tasks, as if they were one task's.
        counts: how many of these are each task's, in order.
    """

    def __init__(self, everything: Component, counts: Sequence[int]):
        self.everything, self.counts = everything, list(counts)
        self.task_S = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        self.task_S = self.task_S.to(everything.means_CF.device)
        # `everything.constant` has the logarithm of S where a task's has that of its own C
        own_T = everything.means_CF.new_tensor(self.counts).log()
        self.constant_T = everything.constant + math.log(len(self.task_S)) - own_T

    def to(self, device: torch.device, dtype: torch.dtype) -> Common:
        return Common(self.everything.to(device, dtype), self.counts)

    def log_densities(self, features_BF: Tensor) -> Tensor:
        """Return the logarithm of each task's density at each image, up to what is the same for all: B x T."""
        one = self.everything
        white_BF = one.whitened(features_BF)
        fits_BS = fits(white_BF, one.means_CF)
        if len(self.task_S) > len(self.counts):
            fits_BS = self._by_task(fits_BS)
        return fits_BS - 0.5 * white_BF.square().sum(dim=1, keepdim=True) + self.constant_T

    def class_fits(self, features_BF: Tensor, task: int) -> Tensor:
        """Return the same of each component of a task, up to what these have in common: B x C."""
        first, own = sum(self.counts[:task]), self.counts[task]
        return fits(self.everything.whitened(features_BF), self.everything.means_CF[first : first + own])

    def _by_task(self, fits_BS: Tensor) -> Tensor:
        """Take the logarithm of the sum of exponentials of each task's components: B x T."""
        task_BS = self.task_S.expand_as(fits_BS)
        nothing_BT = fits_BS.new_full((len(fits_BS), len(self.counts)), -torch.inf)
        best_BT = nothing_BT.scatter_reduce(1, task_BS, fits_BS, "amax")
        return (
            best_BT
            + torch.zeros_like(best_BT).scatter_add(1, task_BS, (fits_BS - best_BT.gather(1, task_BS)).exp()).log()
        )


class DiscriminantSelector(IncrementalSelector):
    """Gaussians whose covariance lies between that of their task and one for all tasks (Friedman 1989).

    A task's score is the logarithm of its density, up to what is the same for all: `-d^2 / 2 - log det(S) / 2`, with
    `d` the Mahalanobis distance from its mean. Its covariance is `S = (1 - shared) S_task + shared S_all`, scatter
    within tasks (or classes) over their number of images, of which `shrinkage` then takes that share from the
    correlations, while variances stay. `shared=1` is linear discriminant analysis, `shared=0` quadratic.

    Both are chosen on the images kept for calibration: the least cross-entropy of the tasks, at the best temperature.
    With a mean per class it tells the classes of a task apart, too, see `class_posterior`.

    Args:
        source, reject_rate, held_out, per_batch, seed, calibration: see `IncrementalSelector`.
        means: one per "tasks", or per "classes", equally likely within a task; needs labels.
        shared: to choose from, in [0, 1]. With 1 alone a task adds its means, else 8 F^2 bytes more.
        shrinkage: to choose from, in [0, 1].
    """

    kind = "discriminant"
    class_temperature: float | None = None
    shared_names = ("scatter",)

    def __init__(
        self,
        source: FeatureSource | None = None,
        *,
        means: Literal["tasks", "classes"] = "tasks",
        shared: Sequence[float] = (0.0, 0.3, 0.6, 0.9, 1.0),
        shrinkage: Sequence[float] = (0.003, 0.01, 0.03, 0.1),
        **options: Any,
    ):
        super().__init__(source, **options)
        if means not in ("tasks", "classes"):
            raise ValueError(f"`means` must be 'tasks' or 'classes', got {means!r}.")
        for name, values in (("shared", shared), ("shrinkage", shrinkage)):
            if not values or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"`{name}` must be shares in [0, 1], at least one; got {list(values)}.")
        self.means = means
        self.shared_shares, self.shrinkage = tuple(shared), tuple(shrinkage)
        self.linear = set(shared) == {1.0}
        self.own_names = (*self.kept_names, "images", "counts", "means", *(() if self.linear else ("scatter",)))

    @classmethod
    def for_classes(cls, clip: nn.Module, **options: Any) -> DiscriminantSelector:
        """Make what has the most to say in classes, for `fuse`: all tokens after a model's last block, one covariance for all.

        Args:
            clip: a CLIP with or without adapters, or its vision tower, for the number of blocks.
            options: others than `source` and `means`, see above.

        Raises:
            TypeError: the model has no vision tower.
        """
        last = len(vision_tower(clip).encoder.layers)
        return cls(Depths((last,), tuple(TOKENS)), means="classes", **{"shared": (1.0,), **options})

    def options(self) -> dict[str, Any]:
        further = {"means": self.means, "shared": list(self.shared_shares), "shrinkage": list(self.shrinkage)}
        return {**super().options(), **further}

    @property
    def needs_labels(self) -> bool:
        return self.means == "classes"

    def _empty_sums(self, width: int) -> State:
        empty = Moments(width)
        sums = {"counts": empty.counts_C, "means": empty.means_CF}
        return sums if self.linear else {**sums, "scatter": empty.scatter_FF}

    def _absorb(self, own: State, shared: State, x_BF: Tensor, labels_B: Tensor) -> tuple[State, State]:
        moments = Moments(x_BF.shape[1])
        moments.counts_C, moments.means_CF = own["counts"].clone(), own["means"].clone()
        before = shared if self.linear else own
        if before.get("scatter") is not None:
            moments.scatter_FF = before["scatter"].clone()
        moments.update(x_BF, labels_B if self.needs_labels else torch.zeros_like(labels_B))
        own = {**own, "counts": moments.counts_C, "means": moments.means_CF}
        scatter = {"scatter": moments.scatter_FF}
        return (own, scatter) if self.linear else ({**own, **scatter}, shared)

    # ------------------------------------------------------------------------------------------------------- selecting

    def _components(self, share: float, intensity: float) -> Separate | Common:
        """Make every task's Gaussians by the two shares, in float64."""
        images = torch.stack([own["counts"].sum() for own in self.own])
        within_FF = self.shared["scatter"] if self.linear else sum(own["scatter"] for own in self.own)
        pooled_FF = within_FF / images.sum()
        floor = (pooled_FF.diagonal().mean().item() or 1.0) * 1e-6

        def shrunk(covariance_FF: Tensor) -> Tensor:
            variances_F = covariance_FF.diagonal().clamp_min(floor)
            covariance_FF = (1 - intensity) * covariance_FF
            covariance_FF.diagonal().copy_(variances_F)
            return covariance_FF

        means = [own["means"][own["counts"] > 0] for own in self.own]
        if share == 1:
            return Common(component(torch.cat(means), shrunk(pooled_FF)), list(map(len, means)))
        made = []
        for own, means_CF, count in zip(self.own, means, images, strict=True):
            covariance_FF = share * pooled_FF + (1 - share) / count * own["scatter"]
            made.append(component(means_CF, shrunk(covariance_FF)))
        return Separate(made)

    @torch.no_grad()
    def choose(self) -> tuple[float, float, float]:
        """Return the share of the common covariance, the shrinkage, and the temperature that fit the kept images best.

        `softmax(temperature * scores)` then is the posterior of the tasks.
        """
        kept_KF = torch.cat([own["kept"] for own in self.own]).double()
        tasks_K = torch.cat([torch.full((len(own["kept"]),), task) for task, own in enumerate(self.own)])
        best = (math.inf, max(self.shared_shares), max(self.shrinkage), 1.0)
        for share in sorted(self.shared_shares, reverse=True):
            for intensity in sorted(self.shrinkage, reverse=True):
                if len(self.shared_shares) * len(self.shrinkage) == 1 or not len(kept_KF):
                    return share, intensity, 1.0
                try:
                    made = self._components(share, intensity)
                except torch.linalg.LinAlgError:
                    continue  # too little shrinkage for so few images
                scores_KT = made.log_densities(kept_KF)
                for temperature in TEMPERATURES.tolist():
                    loss = F.cross_entropy(temperature * scores_KT, tasks_K).item()
                    if loss < best[0]:
                        best = loss, share, intensity, temperature
        return best[1:]

    @torch.no_grad()
    def class_posterior(self, features_BF: Tensor, task: int) -> tuple[Tensor, Tensor]:
        """Return how likely each image of a task is of each of its classes, for `fuse`.

        That is `softmax(temperature * fits)`, classes alike, with the temperature that fits the images kept best (of all
        tasks, tasks alike). Where none could be kept, as with one image a class, all classes are nearly alike, in
        their order.

        Args:
            features_BF: of the images.
            task: its position in `tasks`.

        Returns:
            The labels of the classes that had images, LongTensor[C] in ascending order, and logarithms of their
            probabilities, FloatTensor[B, C].

        Raises:
            RuntimeError: nothing has been fitted yet.
            ValueError: features are NaN, infinite or of another width than those fitted; the selector has means per task
                alone.
        """
        if not self.needs_labels:
            raise ValueError(
                f"means={self.means!r} tells tasks apart, not classes: fit a `DiscriminantSelector.for_classes(model)`."
            )
        if not self.tasks:
            raise RuntimeError("The selector knows no task yet: call `fit(task, features)` first.")
        self._check(features_BF, "to tell classes apart by")
        made = self.prepared(features_BF.device)
        with torch.autocast(features_BF.device.type, enabled=False):
            fits_BC = made.class_fits(features_BF.float(), task)
        if self.class_temperature is None:
            fits_BC = fits_BC - fits_BC.mean(dim=1, keepdim=True)
            fits_BC = NO_SAY * F.normalize(fits_BC, p=torch.inf, dim=1)
        else:
            fits_BC = self.class_temperature * fits_BC
        labels_C = (self.own[task]["counts"] > 0).nonzero().squeeze(1)
        return labels_C.to(features_BF.device), fits_BC.log_softmax(dim=1)

    @torch.no_grad()
    def _calibrate(self, device: torch.device) -> None:
        super()._calibrate(device)
        if not self.needs_labels:
            return
        made, scores, labels = self.prepared(device), [], []
        for task, own in enumerate(self.own):
            fitted = own["counts"] > 0
            rows = [row for row, label in enumerate(own["kept_labels"].tolist()) if fitted[label : label + 1].any()]
            column_of_label = fitted.cumsum(0) - 1
            scores.append(made.class_fits(own["kept"][rows].to(device), task).double().cpu())
            labels.append(column_of_label[own["kept_labels"][rows]])
        self.class_temperature = best_temperature(scores, labels) if any(map(len, scores)) else None

    def _prepare(self, device: torch.device) -> Separate | Common:
        share, intensity, _ = self.choose()
        return self._components(share, intensity).to(device, torch.float32)

    def decision_function(self, features_BF: Tensor) -> Tensor:
        made = self.prepared(features_BF.device)
        with torch.autocast(features_BF.device.type, enabled=False):
            return made.log_densities(features_BF.float())
