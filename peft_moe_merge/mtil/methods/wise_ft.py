"""WiSE-FT: meet halfway between the weights before a task and those after it."""

from __future__ import annotations

import torch

from ..data.task import Task
from .whole_clip import WholeClip, frozen_copy


class WiseFT(WholeClip):
    """Full fine-tuning in sequence; when a task ends, weights become (1 - alpha) before + alpha after.

    Wortsman et al., Robust fine-tuning of zero-shot models, arXiv 2109.01903. There one task is learnt and the weights
    before it are those of the pretrained model; in a stream they are those that the task before has left, so that the
    pretrained ones fade with the number of tasks.
    """

    name = "wise_ft"

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.before = frozen_copy(self.model)

    @torch.no_grad()
    def end_task(self) -> None:
        for weight, before in zip(self.model.parameters(), self.before.parameters(), strict=True):
            weight.copy_(torch.lerp(before.to(weight.device), weight, self.settings.wise_alpha))
        del self.before
