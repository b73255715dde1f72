"""One LoRA per task, whose opinion of an image is fused with that of frozen features."""

from __future__ import annotations

from .fused import Fused
from .lora_per_task import LoraPerTask


class LoraFused(Fused, LoraPerTask):
    """`lora_per_task` and `slda` in one: what fusing does for the ceiling."""

    name = "lora_fused"
