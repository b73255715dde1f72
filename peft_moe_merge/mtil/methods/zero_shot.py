"""The untouched CLIP: what there is to lose, and to win."""

from __future__ import annotations

from pathlib import Path

from .base import Method


class ZeroShot(Method):
    """Learns nothing."""

    name = "zero_shot"
    trains = False

    def save(self, folder: Path) -> None:
        """Write nothing: there is nothing to keep."""

    def load(self, folder: Path) -> None:
        """Read nothing."""
