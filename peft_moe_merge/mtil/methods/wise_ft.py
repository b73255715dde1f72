"""WiSE-FT: meet halfway between the weights before a task and those after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..data.task import Task
from ..settings import setting
from .whole_clip import WholeClip, WholeClipSettings, frozen_copy


@dataclass
class WiseFTSettings(WholeClipSettings):
    """Of WiSE-FT."""

    wise_alpha: float = setting(0.5, "wise_ft: share of the weights after a task; the rest is of those before it")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.wise_alpha <= 1:
            raise ValueError(f"`wise_alpha` must lie in [0, 1], got {self.wise_alpha}.")


class WiseFT(WholeClip):
    """Full fine-tuning in sequence; when a task ends, weights become (1 - alpha) before + alpha after.

    Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903. There one task is learnt and the weights
    before it are those of the pretrained model; in a stream they are those that the task before has left, so that the
    pretrained ones fade with the number of tasks.
    """

    name = "wise_ft"
    settings_class = WiseFTSettings

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.before = frozen_copy(self.model)

    @torch.no_grad()
    def end_task(self) -> None:
        for weight, before in zip(self.model.parameters(), self.before.parameters(), strict=True):
            weight.copy_(torch.lerp(before.to(weight.device), weight, self.settings.wise_alpha))
        del self.before
