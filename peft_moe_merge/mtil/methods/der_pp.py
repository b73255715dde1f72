"""DER++: keep a random few of the images seen, and what the model said of them then."""

# B images of the task, X images replayed, N images kept, C classes of the task an image is from, K the most classes

from __future__ import annotations

import json
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.task import Task
from ..settings import borrowed, check_at_least, setting
from .icarl import ICaRLSettings
from .kept_images import in_bytes, no_images, normalized
from .reservoir import reservoir
from .whole_clip import WholeClip, WholeClipSettings

ReplaySettings = make_dataclass(
    "ReplaySettings", borrowed(ICaRLSettings, ("exemplars", "extra_batch_size")), bases=(WholeClipSettings,)
)


@dataclass
class DERSettings(ReplaySettings):
    """Of DER++."""

    der_alpha: float = setting(0.1, "der_pp: of the squared distance to the logits kept")
    der_beta: float = setting(0.5, "der_pp: of the cross-entropy of images kept")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "exemplars", "extra_batch_size")
        check_at_least(self, 0, "der_alpha", "der_beta")


class DERPP(WholeClip):
    """Full fine-tuning with a reservoir of images, their labels and their logits when they came in.

    Buzzega et al., Dark experience for general continual learning: a strong, simple baseline, arXiv 2004.07211. The loss
    has alpha times the mean squared distance of some images' logits to those kept, and beta times the cross-entropy of
    some others, `extra_batch_size` of each. Every image that was trained on has the same chance to be in the reservoir. In
    the place of one output layer for all classes an image is compared with the class prompts of its own task; that
    layer's logits are CLIP's similarities times its logit scale. Images are kept as cropped, in eight bits, and replayed
    without further augmentation.

    Attributes:
        seen: images that were trained on.
        tasks: class prompts of each task that has begun.
    """

    name = "der_pp"
    settings_class = DERSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pixels_N3HW = no_images(self.processor.image_processor)
        self.labels_N = torch.zeros(0, dtype=torch.long)
        self.task_N = torch.zeros(0, dtype=torch.long)
        self.logits_NK = torch.zeros(0, 0)
        self.seen = 0
        self.tasks: list[list[str]] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.tasks.append(task.prompts(task.templates[0]))
        self.tokens = self.tokenize([prompt for prompts in self.tasks for prompt in prompts])
        self.logits_NK = F.pad(self.logits_NK, (0, max(0, len(self.tasks[-1]) - self.logits_NK.shape[1])))
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the batch plus both of replay, of one pass through the model. Then the batch may come in."""
        device, images = batch["pixel_values"].device, len(batch["labels"])
        far_X, wrong_X = self._draw(), self._draw()
        rows = torch.cat([far_X, wrong_X])
        replayed = normalized(self.pixels_N3HW[rows], self.processor.image_processor).to(device)
        tokens = {name: ids.to(device) for name, ids in self.tokens.items()}
        pixels = torch.cat([batch["pixel_values"], replayed])
        logits = model(pixel_values=pixels, **tokens).logits_per_image.float()

        logits_BC = logits[:images, -len(self.tasks[-1]) :]
        loss = F.cross_entropy(logits_BC, batch["labels"], label_smoothing=self.settings.label_smoothing)
        if len(rows):
            own, real = self._of_own_task(logits[images:], self.task_N[rows].to(device))
            kept_XK = self.logits_NK[far_X].to(device)
            distances_X = ((own[: len(far_X)] - kept_XK) * real[: len(far_X)]).square().sum(dim=1)
            loss = loss + self.settings.der_alpha * (distances_X / real[: len(far_X)].sum(dim=1)).mean()
            answers_XK = own[len(far_X) :].masked_fill(~real[len(far_X) :], -torch.inf)
            loss = loss + self.settings.der_beta * F.cross_entropy(answers_XK, self.labels_N[wrong_X].to(device))
        self._take_in(*(gather(t).cpu() for t in (batch["pixel_values"], batch["labels"], logits_BC.detach())))
        return loss

    def _draw(self) -> Tensor:
        return torch.randperm(len(self.labels_N), generator=self.generator)[: self.settings.extra_batch_size]

    def _of_own_task(self, logits: Tensor, task_X: Tensor) -> tuple[Tensor, Tensor]:
        """Take from logits over all tasks' classes those of each image's task: X x K, and which of these are classes."""
        sizes = torch.tensor([len(prompts) for prompts in self.tasks], device=logits.device)
        column_K = torch.arange(self.logits_NK.shape[1], device=logits.device)
        real_XK = column_K < sizes[task_X, None]
        column_XK = (sizes.cumsum(0) - sizes)[task_X, None] + column_K
        return logits.gather(1, column_XK.where(real_XK, 0)), real_XK

    def _take_in(self, pixel_values: Tensor, labels_B: Tensor, logits_BC: Tensor) -> None:
        pixels_B3HW = in_bytes(pixel_values, self.processor.image_processor)
        logits_BK = F.pad(logits_BC.float(), (0, self.logits_NK.shape[1] - logits_BC.shape[1]))
        new = (pixels_B3HW, labels_B, torch.full_like(labels_B, len(self.tasks) - 1), logits_BK)
        kept = [torch.cat(pair) for pair in zip(self._memory().values(), new, strict=True)]
        rows = reservoir(len(self.labels_N), len(labels_B), self.settings.exemplars, self.seen, self.generator)
        self.seen += len(labels_B)
        self.pixels_N3HW, self.labels_N, self.task_N, self.logits_NK = (tensor[rows] for tensor in kept)

    def _memory(self) -> dict[str, Tensor]:
        return {
            "pixels": self.pixels_N3HW,
            "labels": self.labels_N,
            "task": self.task_N,
            "logits": self.logits_NK,
        }

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_file(self._memory(), folder / "reservoir.safetensors")
        (folder / "reservoir.json").write_text(json.dumps({"seen": self.seen, "tasks": self.tasks}))

    def load(self, folder: Path) -> None:
        super().load(folder)
        memory = load_file(folder / "reservoir.safetensors")
        self.pixels_N3HW, self.labels_N, self.task_N, self.logits_NK = (memory[name] for name in self._memory())
        told = json.loads((folder / "reservoir.json").read_text())
        self.seen, self.tasks = told["seen"], told["tasks"]
