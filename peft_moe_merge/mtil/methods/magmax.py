"""MagMax: tasks are learnt in sequence; of each weight the largest change that any of the models on the way had."""

# T tasks, F inputs of a linear layer, O outputs

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from ..settings import check_positive, setting
from .kept_loras import Changes, KeptLoras
from .lora import LoraSettings


@dataclass
class MagMaxSettings(LoraSettings):
    """Of MagMax."""

    magmax_scaling: float = setting(1.0, "magmax: factor of the merged change")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "magmax_scaling")


class MagMax(KeptLoras):
    """Pretrained weights plus, element by element, that of the task vectors with the largest magnitude.

    Marczak et al., MagMax: leveraging model merging for seamless continual learning, arXiv 2407.06322. A task vector is
    the change from the pretrained weights to those that the sequence has reached when a task ends; training goes on from
    there, not from the merged weights. There all weights are trained, here a LoRA per task on top of those before, so
    that the task vectors are the LoRAs' running sums. With the default factor of 1 the first task's model is the one that
    learnt it.
    """

    name = "magmax"
    settings_class = MagMaxSettings

    def merged(self) -> Changes:
        return {
            layer: self.settings.magmax_scaling * largest(torch.stack([*accumulate(self.changes(layer))]))
            for layer in self.pretrained
        }


def largest(vectors_TOF: torch.Tensor) -> torch.Tensor:
    """Take of each element the one with the largest magnitude, sign included: O x F. The earliest of equal ones."""
    chosen_1OF = vectors_TOF.abs().argmax(dim=0, keepdim=True)
    return vectors_TOF.gather(0, chosen_1OF)[0]
