"""The untouched CLIP: what there is to lose, and to win."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from .base import Method


class ZeroShot(Method):
    """Learns nothing."""

    name = "zero_shot"
    trains = False

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return none."""
        return []

    def save(self, folder: Path) -> None:
        """Write nothing: there is nothing to keep."""

    def load(self, folder: Path) -> None:
        """Read nothing."""
