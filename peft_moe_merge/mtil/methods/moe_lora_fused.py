"""The expert pool with a merged start, whose opinion of an image is fused with that of frozen features."""

from __future__ import annotations

from pathlib import Path

from .fused import Fused
from .moe_lora_warm import MoELoraWarm


class MoELoraFused(Fused, MoELoraWarm):
    """`moe_lora_warm` and `slda` in one: experts learn as there, and a Gaussian per class has its say in the end.

    The adapter it leaves has the Gaussians as its task selector: `ContinualClassifier.from_pretrained(folder, fuse=True)`.
    """

    name = "moe_lora_fused"

    def save(self, folder: Path) -> None:
        self.model.attach_selector(
            self.gaussians
        )  # which the adapter is saved with, so `Fused` need not write it again
        MoELoraWarm.save(self, folder)
        self.model.attach_selector(None)  # in the stream tasks are named, or selectors tried from outside

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.model.attach_selector(None)
