"""RAIL: ridge regression on frozen features, in closed form; images that look unlearnt are left to CLIP."""

# B images, P projection width, M random features, S classes learnt, C classes asked about

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe_merge.inference.zero_shot import cosines

from ..data.features import labelled_features
from ..data.label_space import LabelSpace
from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .base import Method, Settings


@dataclass
class RailSettings(Settings):
    """Of RAIL."""

    rail_features: int = setting(
        1024, "rail: random features; their Gram matrix takes 8 bytes times the square of this"
    )
    rail_ridge: float = setting(0.01, "rail: regularization")
    rail_fusion: float = setting(0.8, "rail: share of the regression in its mean with CLIP's own choice")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "rail_features")
        check_positive(self, "rail_ridge")
        if not 0 <= self.rail_fusion <= 1:
            raise ValueError(f"`rail_fusion` must lie in [0, 1], got {self.rail_fusion}.")


class Rail(Method):
    """The primal form: a random ReLU layer on CLIP's image features, regressed on all classes learnt so far.

    Xu et al., Advancing cross-domain discriminability in continual learning of vision-language models, arXiv 2406.18868.
    That paper updates the solution and the inverse of the regularized Gram matrix task by task; kept here are the Gram
    matrix and the features' sums per class, of which the same solution follows. Where CLIP's own choice among the classes
    asked about is a learnt one, its probabilities and the regression's outputs are averaged, those of other classes
    being 0; else CLIP's stand. Training images are looked at once, without augmentation; both towers stay as they are.

    Attributes:
        prompts: of each learnt class, by the first template of its task.
        weights_MS: of the regression.
    """

    name = "rail"
    settings_class = RailSettings
    trains = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model.requires_grad_(False)
        self.seed = torch.initial_seed()
        size = self.settings.rail_features
        self.gram_MM = torch.zeros(size, size, dtype=torch.float64)
        self.sums_SM = torch.zeros(0, size, dtype=torch.float64)
        self.prompts: list[str] = []

    @torch.no_grad()
    def learn(self, task: Task) -> None:
        device = next(self.model.parameters()).device
        sums_SM = torch.zeros(len(task.class_names), self.settings.rail_features, dtype=torch.float64)

        def see(pixel_values: Tensor) -> Tensor:
            return self.image_features(pixel_values.to(device)).cpu().double()

        for features_BP, labels_B in labelled_features(task, self.processor.image_processor, see):
            x_BM = self.random_features(features_BP)
            self.gram_MM = self.gram_MM + x_BM.T @ x_BM
            sums_SM += F.one_hot(labels_B, len(sums_SM)).double().T @ x_BM
        self.sums_SM = torch.cat([self.sums_SM, sums_SM])
        self.prompts = self.prompts + task.prompts(task.templates[0])
        self._solve()

    def random_features(self, features_BP: Tensor) -> Tensor:
        """Return the hidden layer, B x M, in the features' precision."""
        projection_PM = projection(features_BP.shape[1], self.settings.rail_features, self.seed)
        return (features_BP @ projection_PM.to(features_BP)).relu()

    def _solve(self) -> None:
        regular_MM = self.gram_MM + self.settings.rail_ridge * torch.eye(len(self.gram_MM), dtype=torch.float64)
        weights_MS = torch.cholesky_solve(self.sums_SM.T, torch.linalg.cholesky(regular_MM))
        self.weights_MS = nn.Parameter(weights_MS, requires_grad=False)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what is solved for."""
        return [self.weights_MS]

    def scorer(self, classes: LabelSpace, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return what scores images for classes, B x C. A class is a learnt one if its prompts are among those learnt."""
        classes_CP = self.encode_classes(classes.prompts, device)
        columns = [[s for s, known in enumerate(self.prompts) if known in own] for own in map(set, classes.prompts)]
        learnt_C = torch.tensor([bool(own) for own in columns], device=device)

        def scores(pixel_values: Tensor) -> Tensor:
            features_BP = self.image_features(pixel_values)
            scores_BC = (self.model.logit_scale.exp().float() * cosines(features_BP, classes_CP)).softmax(dim=1)
            with torch.autocast(device.type, enabled=False):
                outputs_BS = self.random_features(features_BP) @ self.weights_MS.to(features_BP)
            outputs_BC = torch.zeros_like(scores_BC)
            for asked, own in enumerate(columns):
                if own:
                    outputs_BC[:, asked] = outputs_BS[:, own].amax(dim=1)
            fused_BC = torch.lerp(scores_BC, outputs_BC, self.settings.rail_fusion)
            return torch.where(learnt_C[scores_BC.argmax(dim=1)][:, None], fused_BC, scores_BC)

        return scores

    def save(self, folder: Path) -> None:
        save_file({"gram": self.gram_MM, "sums": self.sums_SM}, folder / "sums.safetensors")
        (folder / "learnt.json").write_text(json.dumps({"prompts": self.prompts, "seed": self.seed}))

    def load(self, folder: Path) -> None:
        sums = load_file(folder / "sums.safetensors")
        self.gram_MM, self.sums_SM = sums["gram"], sums["sums"]
        learnt = json.loads((folder / "learnt.json").read_text())
        self.prompts, self.seed = learnt["prompts"], learnt["seed"]
        self._solve()


@lru_cache(maxsize=2)  # every batch asks for it
def projection(width: int, features: int, seed: int) -> Tensor:
    """Draw the weights of the hidden layer, P x M in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(width, features, generator=generator, dtype=torch.float64) / width**0.5
