"""What a continual learning method is to the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.inference.zero_shot import class_features, prompts_of, tokenize

from ..data.batches import Batch
from ..data.task import Task
from ..settings import setting


@dataclass
class MethodSettings:
    """What methods can be told; each takes what concerns it. The defaults are those of arXiv 2405.11530."""

    label_smoothing: float = setting(0.2, "of the cross-entropy")
    num_experts: int = setting(55, "experts per block")
    top_k: int = setting(2, "experts that a sample takes")
    r: int = setting(64, "bottleneck rank of an expert")
    merge_every: int = setting(100, "optimizer steps between merges of experts")
    freeze_top_k: int = setting(2, "experts that freeze per block when a task ends")
    merge_strategy: str = setting("average", "how two experts become one: average or aligned")
    merge_pair: str = setting("most_used", "which two experts merge: most_used or most_similar")
    merge_router_columns: str = setting(
        "keep", "the router's column of an overwritten expert: keep, or mean of the two"
    )
    router_balance_loss: float = setting(0.0, "weight of the loss that spreads samples over experts")
    router_locality_loss: float = setting(0.0, "weight of the loss that keeps routers off experts that moved far")
    router_stop: int | None = setting(None, "steps of a task after which its routers train no more")
    router_gap: float | None = setting(None, "stop each router by the gate-gap test with this threshold instead")
    full_lr: float = setting(
        5e-4, "peak learning rate of methods that train all of CLIP's weights; 1e-5 for CLIPs of the usual size"
    )
    lora_r: int = setting(16, "rank of a LoRA")
    lora_lr: float = setting(5e-3, "peak learning rate of a LoRA")
    wise_alpha: float = setting(0.5, "wise_ft: share of the weights after a task; the rest is of those before it")
    distillation_weight: float = setting(1.0, "lwf, lwf_vr, zscl, icarl: of the distillation loss")
    extra_batch_size: int = setting(
        64, "random sentences, reference images or exemplars per step, on top of the task's"
    )
    average_every: int = setting(10, "zscl: optimizer steps between the weights that are averaged")
    reference: str = setting(
        "mini", "zscl: 'mini', drawings; 'tiny_imagenet', from the Hub; or a folder <class>/<images>"
    )
    exemplars: int = setting(500, "icarl: images kept, over all classes")

    def __post_init__(self):
        for name in ("lora_r", "extra_batch_size", "average_every", "exemplars"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.wise_alpha <= 1:
            raise ValueError(f"`wise_alpha` must lie in [0, 1], got {self.wise_alpha}.")
        for name in ("full_lr", "lora_lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.distillation_weight < 0:
            raise ValueError(f"`distillation_weight` must not be negative, got {self.distillation_weight}.")


class Method(ABC):
    """Learns one task after another. One instance runs one stream.

    The stream calls `begin_task`, then per step `loss` and `after_step`, then `end_task`; and between tasks, for the
    accuracies, `prepare_evaluation` and the two `features`.

    Attributes:
        model: what is trained, and saved.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = True

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: MethodSettings):
        self.model: nn.Module = clip
        self.processor = processor
        self.settings = settings
        clip.logit_scale.requires_grad_(False)

    def begin_task(self, task: Task) -> None:
        """Get ready to train a task."""
        self.prompts = self.tokenize(task.prompts(task.templates[0]))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what the optimizer of the current task gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def learning_rate(self, lr: float) -> float:
        """Return the peak learning rate for a task where the stream suggests `lr`, which suits experts."""
        return lr

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the images' similarities to all class prompts of the task, encoded anew each step.

        Args:
            model: `self.model`, perhaps wrapped for parallel training; gradients must go through it.
            batch: on the model's device.
        """
        device = batch["pixel_values"].device
        prompts = {name: tensor.to(device) for name, tensor in self.prompts.items()}
        logits_BC = model(pixel_values=batch["pixel_values"], **prompts).logits_per_image
        return F.cross_entropy(logits_BC.float(), batch["labels"], label_smoothing=self.settings.label_smoothing)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Act after an optimizer step."""

    def end_task(self) -> None:
        """Act when a task's training is over."""

    def prepare_evaluation(self, task: Task) -> None:
        """Get ready to be tested on a task, learnt or not."""

    def image_features(self, pixel_values: Tensor) -> Tensor:
        """Encode images: B x P, of unit length."""
        return F.normalize(self.model.get_image_features(pixel_values).pooler_output.float(), dim=-1)

    def class_features(self, task: Task, device: torch.device) -> Tensor:
        """Encode classes, the mean over the task's templates: C x P, of unit length.

        The stream calls it once per evaluation of a task.
        """
        prompts = prompts_of(task.class_names, task.templates)
        return class_features(self.model, self.processor.tokenizer, prompts, device=device)

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize prompts, padded to the longest."""
        return tokenize(self.processor.tokenizer, prompts)

    def story(self) -> dict[str, Any]:
        """Tell what happened inside during the task just ended, for the report: fields of `Progress`."""
        return {}

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write all that was learnt, as safetensors and JSON."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
