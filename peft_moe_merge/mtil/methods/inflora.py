"""InfLoRA: a LoRA whose down projection reads what the new task's inputs have and the old tasks' have not."""

# F inputs of a linear layer, R rank, K directions that are still free, N inputs

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..data.batches import eval_batches
from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .kept_loras import KeptLoras
from .lora import LoraSettings


@dataclass
class InfLoraSettings(LoraSettings):
    """Of InfLoRA."""

    inflora_lr: float = setting(2.5e-3, "inflora: peak learning rate of the up projections")
    inflora_threshold: float = setting(0.95, "inflora: share of a task's squared inputs that later tasks keep out of")
    inflora_images: int = setting(256, "inflora: training images of a task whose inputs to the layers are looked at")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "inflora_lr")
        check_at_least(self, 1, "inflora_images")
        if not 0 < self.inflora_threshold <= 1:
            raise ValueError(f"`inflora_threshold` must lie in (0, 1], got {self.inflora_threshold}.")


class InfLora(KeptLoras):
    """Down projections are set once per task and stay; up projections learn; the product is folded into the weights.

    Liang and Li, InfLoRA: interference-free low-rank adaptation for continual learning, arXiv 2404.00228. A layer's
    gradient lies in the span of its inputs. Of the new task's inputs the part outside the old tasks' span is taken, and
    its principal directions are the rows of the down projection, so that the old tasks' outputs do not change. What
    old tasks span grows by GPM (arXiv 2103.09762): when a task ends, by the fewest directions that bring the share of its
    squared inputs within up to the threshold; of that space and its complement the smaller is kept (DualGPM). Here both
    towers and all linear layers have such a LoRA, where that paper has it in the keys and values of a vision transformer,
    and the threshold is the same for all tasks, where it grows there. Rows have the length that PEFT's LoRA starts with,
    1 / sqrt(3) on average. Where fewer directions are left than the rank the other rows are zero.

    Attributes:
        free: by layer, an orthonormal basis of the directions that no task has taken, F x K; absent before any task.
    """

    name = "inflora"
    settings_class = InfLoraSettings
    shardable = (
        False  # directions come with either sign by mere rounding, so that it can't be compared weight by weight
    )

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._kept: dict[str, Tensor] = {}  # by layer and kind: a basis of what is free, or of what is taken

    @property
    def free(self) -> dict[str, Tensor]:
        kinds = (name.rpartition(".") for name in self._kept)
        return {
            layer: self._kept[f"{layer}.{kind}"].double()
            if kind == "free"
            else complement(self._kept[f"{layer}.{kind}"].double())
            for layer, _, kind in kinds
        }

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.task = task
        # of the task's seed, but apart from the generator that crops images: all methods see the same crops
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.rows = torch.randperm(len(task.train), generator=generator)[: self.settings.inflora_images].tolist()
        grams, free = self.input_grams(), self.free
        for layer, lora in self.layers().items():
            down_RF = lora.lora_A["default"].weight.requires_grad_(False)
            directions_FK = principal(grams[layer], free.get(layer))[1][:, : len(down_RF)]
            down_RF.zero_()
            down_RF[: directions_FK.shape[1]] = directions_FK.T.to(down_RF) / 3**0.5

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return [{"params": self.trainable_parameters(), "lr": lr}]

    def learning_rate(self, lr: float) -> float:
        return self.settings.inflora_lr

    @torch.no_grad()
    def end_task(self) -> None:
        self._take(self.input_grams())
        super().end_task()
        del self.task, self.rows

    def _take(self, grams: dict[str, Tensor]) -> None:
        """Let the task's inputs take directions from those that are free."""
        free, self._kept = self.free, {}
        for layer, gram_FF in grams.items():
            values_K, directions_FK = principal(gram_FF, free.get(layer))
            total = gram_FF.trace()
            within = total - values_K.sum() + torch.cat([values_K.new_zeros(1), values_K.cumsum(0)])
            taken = int((within < self.settings.inflora_threshold * total * (1 - 1e-12)).sum())
            free_FK = directions_FK[:, taken:]
            if free_FK.shape[1] <= len(free_FK) // 2:
                self._kept[f"{layer}.free"] = free_FK.float().contiguous()
            else:
                self._kept[f"{layer}.taken"] = complement(free_FK).float().contiguous()

    @torch.no_grad()
    def input_grams(self) -> dict[str, Tensor]:
        """Sum the products of each layer's inputs with themselves, over some images of the task and its class prompts.

        Padding of prompts does not count. By layer, F x F in float64.
        """
        self.model.eval()
        device = next(self.model.parameters()).device
        images = self.task.train.select(self.rows)
        with self._summing() as grams:
            for batch in eval_batches(images, self.processor.image_processor, batch_size=64):
                self.model.get_image_features(batch["pixel_values"].to(device))
        prompts = {name: tensor.to(device) for name, tensor in self.prompts.items()}
        with self._summing(prompts["attention_mask"].bool()) as of_text:
            self.model.get_text_features(**prompts)
        return {layer: grams.get(layer, of_text.get(layer)) for layer in self.pretrained}

    @contextmanager
    def _summing(self, mask_BL: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        grams: dict[str, Tensor] = {}

        def hook(layer: str) -> Any:
            def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x_NF = (inputs[0] if mask_BL is None else inputs[0][mask_BL]).flatten(0, -2).double()
                grams[layer] = grams.get(layer, 0) + (x_NF.T @ x_NF).cpu()

            return add

        handles = [module.register_forward_pre_hook(hook(layer)) for layer, module in self.layers().items()]
        try:
            yield grams
        finally:
            for handle in handles:
                handle.remove()

    def save(self, folder: Path) -> None:
        super().save(folder)
        save_file(self._kept, folder / "subspaces.safetensors")

    def save_so_far(self, folder: Path) -> None:
        super().save_so_far(folder)
        save_file(self._kept, folder / "subspaces.safetensors")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._kept = load_file(folder / "subspaces.safetensors")


def principal(gram_FF: Tensor, free_FK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of inputs within a space, falling, and their directions: K and F x K."""
    if free_FK is None:
        free_FK = torch.eye(len(gram_FF), dtype=gram_FF.dtype)
    values_K, turned_KK = torch.linalg.eigh(free_FK.T @ gram_FF @ free_FK)
    return values_K.flip(0).clamp_min(0), (free_FK @ turned_KK).flip(1)


def complement(basis_FK: Tensor) -> Tensor:
    """Return an orthonormal basis of the directions that another, orthonormal one lacks."""
    return torch.linalg.qr(basis_FK, mode="complete")[0][:, basis_FK.shape[1] :]
