"""Autoencoders on frozen features: the task whose autoencoder reconstructs an image best (DDAS, arXiv 2403.11549).

Shapes: B images, N training images, F features, H bottleneck, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .features import FeatureSource
from .taskwise import TaskwiseSelector

TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")


@dataclass(frozen=True)
class Training:
    """How an autoencoder trains.

    Args:
        bottleneck: hidden units.
        iterations: training steps per task.
        reference_iterations: the same for the reference set.
        batch_size: images per step.
        lr: Adam's learning rate, a tenth after every `decay_epochs` passes over the images.
        weight_decay: Adam's.
        decay_epochs: see `lr`.
    """

    bottleneck: int = 100
    iterations: int = 300
    reference_iterations: int = 1000
    batch_size: int = 64
    lr: float = 0.01
    weight_decay: float = 1e-4
    decay_epochs: int = 10

    def __post_init__(self):
        for name in ("bottleneck", "iterations", "reference_iterations", "batch_size", "decay_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


class AutoencoderSelector(TaskwiseSelector):
    """One autoencoder per task, `sigmoid(f) -> linear -> relu -> linear -> sigmoid`, trained on squared error.

    A task's score is minus the mean squared error of its reconstruction. The defaults are those of the paper, except
    that the threshold is calibrated on held-out images; the paper has 0.0655 for AlexNet's features. All training
    features of a task are held in memory while it is fitted.

    Args:
        source, reject_rate, held_out, per_batch, seed: see `Selector`.
        threshold: the largest error that is still one of a known task's images; None calibrates it per task.
        bottleneck, iterations, reference_iterations, batch_size, lr, weight_decay, decay_epochs: see `Training`.

    Raises:
        TypeError: an option that there is not.
        ValueError: an option out of range.
    """

    kind = "autoencoder"
    own_names = TENSORS
    shared_names = tuple(f"reference_{name}" for name in TENSORS)

    def __init__(self, source: FeatureSource | None = None, *, threshold: float | None = None, **options: Any):
        own = {field.name: options.pop(field.name) for field in fields(Training) if field.name in options}
        super().__init__(source, **options)
        self.threshold = threshold
        self.training = Training(**own)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "threshold": self.threshold, **asdict(self.training)}

    def fit_reference(self, features_NF: Tensor) -> None:
        """Train an autoencoder on images of no task, such as a broad set of photographs; it wins for none of them.

        Raises:
            ValueError: features are NaN, infinite or of another width than those fitted.
        """
        self._check(features_NF, "of the reference set")
        trained = self._train(features_NF, self.training.reference_iterations, self.seed)
        self.shared = {f"reference_{name}": tensor for name, tensor in trained.items()}
        self.width = features_NF.shape[1]
        self._prepared = {}

    def _learn(
        self, task: str, batches: Iterator[tuple[Tensor, Tensor | None]], texts_CP: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        features_NF = torch.cat([features_BF for features_BF, _ in batches])
        return self._train(features_NF, self.training.iterations, self.seed + len(self.tasks) + 1), self.shared

    def _train(self, features_NF: Tensor, iterations: int, seed: int) -> dict[str, Tensor]:
        target_NF = features_NF.float().sigmoid()
        images, width = target_NF.shape
        batch_size = min(self.training.batch_size, images)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = nn.Sequential(nn.Linear(width, self.training.bottleneck), nn.ReLU())
            network.append(nn.Linear(self.training.bottleneck, width)).append(nn.Sigmoid())
            network.to(target_NF.device)
            optimizer = torch.optim.Adam(
                network.parameters(), lr=self.training.lr, weight_decay=self.training.weight_decay
            )
            epoch = -(-images // batch_size)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, epoch * self.training.decay_epochs)
            order = torch.cat([torch.randperm(images) for _ in range(-(-iterations // epoch))])
            rows = [part for part_of in order.split(images) for part in part_of.split(batch_size)]
            for rows_B in rows[:iterations]:
                target_BF = target_NF[rows_B.to(target_NF.device)]
                F.mse_loss(network(target_BF), target_BF).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        return {name: p.detach().cpu() for name, p in zip(TENSORS, network.parameters(), strict=True)}

    def _prepare(self, device: torch.device) -> list[list[Tensor]]:
        networks = [[own[name].to(device) for name in TENSORS] for own in self.own]
        if self.shared:
            networks.append([self.shared[f"reference_{name}"].to(device) for name in TENSORS])
        return networks

    def _score(self, features_BF: Tensor, network: list[Tensor]) -> Tensor:
        down_HF, down_bias_H, up_FH, up_bias_F = network
        with torch.autocast(features_BF.device.type, enabled=False):
            target_BF = features_BF.float().sigmoid()
            hidden_BH = F.linear(target_BF, down_HF, down_bias_H).relu()
            return -(F.linear(hidden_BH, up_FH, up_bias_F).sigmoid() - target_BF).square().mean(dim=1)

    def decision_function(self, features_BF: Tensor) -> Tensor:
        networks = self.prepared(features_BF.device)[: len(self.own)]
        return torch.stack([self._score(features_BF, network) for network in networks], dim=1)

    def bars(self, features_BF: Tensor, scores_BT: Tensor, together: int = 1) -> Tensor:
        bars_BT = super().bars(features_BF, scores_BT, together)
        if self.threshold is not None:
            bars_BT = torch.full_like(bars_BT, -self.threshold)
        if self.shared:
            reference_B = self._score(features_BF, self.prepared(features_BF.device)[-1])
            bars_BT = bars_BT.maximum(reference_B[:, None])
        return bars_BT
