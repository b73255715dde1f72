"""iCaRL-style replay: keep a few images of every class, and look at them again."""

# B images of the task, C its classes, X exemplars replayed, O classes of earlier tasks, N exemplars kept

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_moe_merge.inference.rgb import to_rgb

from ..data.batches import Batch, eval_batches
from ..data.task import Task, labels_of
from ..settings import check_at_least, setting
from .distillation import ExtraBatchSettings, distillation_loss
from .herding import herd
from .kept_images import no_images, normalized
from .whole_clip import WholeClip, frozen_copy


@dataclass
class ICaRLSettings(ExtraBatchSettings):
    """Of iCaRL."""

    exemplars: int = setting(500, "icarl, der_pp: images kept, over all classes")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "exemplars")


class ICaRL(WholeClip):
    """Full fine-tuning with a fixed number of exemplars, chosen by herding, and distillation from the model before.

    Rebuffi et al., iCaRL: incremental classifier and representation learning, arXiv 1611.07725. The memory holds as many
    images of every class seen so far as fit; with each new task all classes give some up. Each step replays a few beside
    the task's own images: cross-entropy of each among the classes of its own task, and distillation of all images among
    all earlier classes. Simplified: softmax instead of that paper's sigmoids, and CLIP's class prompts instead of its
    nearest mean of exemplars, so that all methods are tested alike; exemplars are replayed without augmentation.
    """

    name = "icarl"
    settings_class = ICaRLSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.earlier: list[list[str]] = []  # class prompts, per task
        self.pixels_N3HW = no_images(self.processor.image_processor)
        self.classes_N = torch.zeros(0, dtype=torch.long)  # numbered over all earlier tasks

    @classmethod
    def check(cls, settings: ICaRLSettings, tasks: Sequence[Task]) -> None:
        """Refuse a memory that has no room for an image of every class."""
        classes = 0
        for task in tasks:
            classes += len(task.class_names)
            if settings.exemplars < classes:
                raise ValueError(
                    f"exemplars={settings.exemplars} is less than one image for each of the {classes} classes up to "
                    f"task {task.name!r}; allow more."
                )

    def begin_task(self, task: Task) -> None:
        self.task = task
        self.task_prompts = task.prompts(task.templates[0])
        self.earlier_prompts = [prompt for prompts in self.earlier for prompt in prompts]
        super().begin_task(task)
        self.teacher = frozen_copy(self.model)
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        self.generator = torch.Generator().manual_seed(torch.initial_seed())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of images and exemplars plus distillation of both, of one pass through the model."""
        if not self.earlier:
            return super().loss(model, batch)
        device = batch["pixel_values"].device
        rows_X = torch.randperm(len(self.classes_N), generator=self.generator)[: self.settings.extra_batch_size]
        pixels = torch.cat(
            [batch["pixel_values"], normalized(self.pixels_N3HW[rows_X], self.processor.image_processor).to(device)]
        )
        classes_X = self.classes_N[rows_X].to(device)
        tokens = self.tokenize(self.earlier_prompts + self.task_prompts)
        tokens = {name: ids.to(device) for name, ids in tokens.items()}
        old, new = len(self.earlier_prompts), len(batch["labels"])

        logits = model(pixel_values=pixels, **tokens).logits_per_image.float()
        smoothing = self.settings.label_smoothing
        losses = [F.cross_entropy(logits[:new, old:], batch["labels"], label_smoothing=smoothing, reduction="none")]
        first = 0
        for prompts in self.earlier:
            own_X = (classes_X >= first) & (classes_X < first + len(prompts))
            logits_XC = logits[new:, first : first + len(prompts)][own_X]
            labels_X = classes_X[own_X] - first
            losses.append(F.cross_entropy(logits_XC, labels_X, label_smoothing=smoothing, reduction="none"))
            first += len(prompts)
        with torch.no_grad():
            tokens = {name: ids[:old] for name, ids in tokens.items()}
            teacher = self.teacher.to(device)(pixel_values=pixels, **tokens).logits_per_image
        return torch.cat(losses).mean() + self.settings.distillation_weight * distillation_loss(
            logits[:, :old], teacher
        )

    @torch.no_grad()
    def end_task(self) -> None:
        """Make room for the task's classes, then choose exemplars by the features just learnt."""
        self.model.eval()
        device = next(self.model.parameters()).device
        processor = self.processor.image_processor
        batches = eval_batches(self.task.train, processor, batch_size=64)
        features_NP = torch.cat([self.image_features(batch["pixel_values"].to(device)).cpu() for batch in batches])
        labels_N = torch.from_numpy(labels_of(self.task.train))
        first = len(self.earlier_prompts)
        count = self.settings.exemplars // (first + len(self.task_prompts))

        kept = [(self.classes_N == old).nonzero()[:count, 0] for old in range(first)]
        kept = torch.cat([torch.zeros(0, dtype=torch.long), *kept])
        rows: list[int] = []
        for label in range(len(self.task_prompts)):
            members = (labels_N == label).nonzero()[:, 0]
            rows += members[herd(features_NP[members], count)].tolist()
        images = [to_rgb(image) for image in self.task.train[rows]["image"]]
        pixels = processor(images, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
        self.pixels_N3HW = torch.cat([self.pixels_N3HW[kept], pixels.to(torch.uint8)])
        self.classes_N = torch.cat([self.classes_N[kept], labels_N[rows] + first])
        self.earlier.append(self.task_prompts)
        del self.teacher, self.task

    def save(self, folder: Path) -> None:
        super().save(folder)
        exemplars = {"pixels": self.pixels_N3HW, "classes": self.classes_N}
        save_file(exemplars, folder / "exemplars.safetensors")
        (folder / "earlier_prompts.json").write_text(json.dumps(self.earlier))

    def load(self, folder: Path) -> None:
        super().load(folder)
        exemplars = load_file(folder / "exemplars.safetensors")
        self.pixels_N3HW, self.classes_N = exemplars["pixels"], exemplars["classes"]
        self.earlier = json.loads((folder / "earlier_prompts.json").read_text())
