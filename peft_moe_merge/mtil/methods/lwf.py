"""LwF: on a task's images, keep answering the earlier tasks' questions as before."""

# B images, C classes of the task, R texts to distil on

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.task import Task
from .distillation import DistillationSettings, distillation_loss
from .whole_clip import WholeClip, frozen_copy


class LwF(WholeClip):
    """Full fine-tuning, and distillation from the model before the task: of its images against earlier class prompts.

    Li and Hoiem, Learning without forgetting, arXiv 1606.09282. Simplified: all earlier tasks' classes share one softmax
    where that paper has one per task, their prompts take the place of old output heads, and there is no phase in which
    only the new head warms up. The first task has nothing to distil.
    """

    name = "lwf"
    settings_class = DistillationSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.earlier_prompts: list[str] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.teacher = frozen_copy(self.model)
        self.task_prompts = task.prompts(task.templates[0])

    def distilled_texts(self) -> list[str]:
        """Return the sentences between which the teacher and the model choose, at each step."""
        return self.earlier_prompts

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy on the task plus distillation on the other texts, of one pass through the model."""
        device = batch["pixel_values"].device
        texts = self.distilled_texts()
        tokens = {name: ids.to(device) for name, ids in self.tokenize(self.task_prompts + texts).items()}
        logits = model(pixel_values=batch["pixel_values"], **tokens).logits_per_image.float()
        logits_BC, logits_BR = logits.split([len(self.task_prompts), len(texts)], dim=1)
        loss = F.cross_entropy(logits_BC, batch["labels"], label_smoothing=self.settings.label_smoothing)
        if texts:
            tokens = {name: ids[len(self.task_prompts) :] for name, ids in tokens.items()}
            with torch.no_grad():
                teacher_BR = self.teacher.to(device)(pixel_values=batch["pixel_values"], **tokens).logits_per_image
            loss = loss + self.settings.distillation_weight * distillation_loss(logits_BR, teacher_BR)
        return loss

    def end_task(self) -> None:
        self.earlier_prompts = self.earlier_prompts + self.task_prompts
        del self.teacher

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / "earlier_prompts.json").write_text(json.dumps(self.earlier_prompts))

    def load(self, folder: Path) -> None:
        super().load(folder)
        self.earlier_prompts = json.loads((folder / "earlier_prompts.json").read_text())
