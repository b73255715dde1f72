"""ZSCL: on images and sentences beside the stream, keep matching them as the original CLIP does."""

# B images of the task, C classes of the task, R reference images, S reference sentences

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_moe_merge.inference.rgb import to_rgb
from peft_moe_merge.tuners.moe_lora_merge.distributed import gathered

from ..data.batches import Batch
from ..data.reference import load_reference
from ..data.task import Task, image_content
from ..settings import check_at_least, setting
from .distillation import ExtraBatchSettings, distillation_loss
from .whole_clip import WholeClip, frozen_copy


@dataclass
class ZSCLSettings(ExtraBatchSettings):
    """Of ZSCL."""

    average_every: int = setting(10, "zscl: optimizer steps between the weights that are averaged")
    reference: str = setting(
        "mini", "zscl: 'mini', drawings; 'tiny_imagenet', from the Hub; or a folder <class>/<images>"
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "average_every")


class ZSCL(WholeClip):
    """Full fine-tuning, distillation from the original CLIP on a reference set, and the average of a task's weights.

    Zheng et al., Preventing zero-shot transfer degradation in continual learning of vision-language models, arXiv
    2303.06628: images choose among sentences and sentences among images, both as the original CLIP does; and a running
    mean over the weights at the task's start and every so many steps replaces those at its end. Simplified: the reference
    set is small (drawings, or a folder) where that paper takes ImageNet and Conceptual Captions, and weights are averaged
    every `average_every` steps, by default more often than its 100, so that short tasks average too.
    """

    name = "zscl"
    settings_class = ZSCLSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = frozen_copy(self.model)
        self.reference = load_reference(self.settings.reference)

    @classmethod
    def check(cls, settings: ZSCLSettings, tasks: Sequence[Task]) -> None:
        """Refuse a reference set that can't be had."""
        load_reference(settings.reference)

    @classmethod
    def content(cls, settings: ZSCLSettings) -> dict[str, str]:
        reference = load_reference(settings.reference)
        sentences = hashlib.sha256("\n".join(reference.sentences).encode()).hexdigest()
        return {"reference_content": image_content(reference.images, "the reference")[:16] + sentences[:16]}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        self.task_prompts = task.prompts(task.templates[0])
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.steps, self.averaged = 0, 1

    def _draw(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator)[: self.settings.extra_batch_size].tolist()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy on the task plus distillation both ways on the reference, of one pass through the model."""
        pixels, labels = batch["pixel_values"], batch["labels"]
        images = self.reference.images[self._draw(len(self.reference.images))]["image"]
        rows = self.processor.image_processor([to_rgb(image) for image in images], return_tensors="pt")
        reference_R3HW = rows["pixel_values"].to(pixels)
        sentences = [self.reference.sentences[row] for row in self._draw(len(self.reference.sentences))]
        tokens = {name: ids.to(pixels.device) for name, ids in self.tokenize(self.task_prompts + sentences).items()}

        logits = model(pixel_values=torch.cat([pixels, reference_R3HW]), **tokens).logits_per_image.float()
        classes = len(self.task_prompts)
        logits_BC, logits_RS = logits[: len(pixels), :classes], logits[len(pixels) :, classes:]
        loss = F.cross_entropy(logits_BC, labels, label_smoothing=self.settings.label_smoothing)
        with torch.no_grad():
            tokens = {name: ids[classes:] for name, ids in tokens.items()}
            teacher_RS = self.teacher.to(pixels.device)(pixel_values=reference_R3HW, **tokens).logits_per_image
        both_ways = distillation_loss(logits_RS, teacher_RS) + distillation_loss(logits_RS.T, teacher_RS.T)
        return loss + self.settings.distillation_weight * both_ways

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.steps += 1
        if self.steps % self.settings.average_every == 0:
            self._average()

    def _average(self) -> None:
        self.averaged += 1
        for mean, weight in zip(self.average.parameters(), self.model.parameters(), strict=True):
            weight = gathered(weight).reshape(mean.shape)  # sharded, scalars are vectors
            mean.copy_(torch.lerp(mean.to(weight.device), weight, 1 / self.averaged))

    @torch.no_grad()
    def end_task(self) -> None:
        if self.steps % self.settings.average_every:  # the last weights count, however short the task
            self._average()
        for weight, mean in zip(self.model.parameters(), self.average.parameters(), strict=True):
            weight.copy_(mean)
        del self.average
