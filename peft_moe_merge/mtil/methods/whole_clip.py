"""What methods that train all weights of CLIP have in common."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_model, save_model
from torch import nn

from ..settings import check_positive, setting
from .base import Method, Settings


@dataclass
class WholeClipSettings(Settings):
    """Of methods that train all of CLIP's weights."""

    full_lr: float = setting(
        5e-4, "peak learning rate of methods that train all of CLIP's weights; 1e-5 for CLIPs of the usual size"
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "full_lr")


class WholeClip(Method):
    """Trains all weights but the logit scale, and keeps them all."""

    settings_class = WholeClipSettings

    def learning_rate(self, lr: float) -> float:
        return self.settings.full_lr

    def save(self, folder: Path) -> None:
        save_model(self.model, str(folder / "model.safetensors"))

    def load(self, folder: Path) -> None:
        load_model(self.model, str(folder / "model.safetensors"))


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model to look back at: not trained, and untouched by what happens to the original."""
    return copy.deepcopy(model).requires_grad_(False).eval()
