"""Full fine-tuning in sequence: what forgets."""

from __future__ import annotations

from .whole_clip import WholeClip


class Finetune(WholeClip):
    """All weights of CLIP learn each task in turn, and nothing holds them back."""

    name = "finetune"
