"""What methods have in common that keep the LoRA of every task and fold them into the weights."""

# F inputs of a linear layer, O outputs, R rank

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from ..checkpoint import FINISHED, write_finished
from ..data.task import Task
from .base import Method
from .lora import TARGETS, LoraSettings, lora_config

Changes = dict[str, Tensor]
"""By linear layer, what is added to its pretrained weight: O x F."""


class KeptLoras(Method):
    """A fresh PEFT LoRA learns each task, of both towers, on weights that earlier LoRAs may have changed.

    When a task ends its LoRA is kept, and the weights become the pretrained ones plus what a method makes of all LoRAs.
    Both follow from the LoRAs alone, so nothing else is stored.

    Attributes:
        loras: per task, by linear layer, the two factors: down R x F and up O x R, scaled.
        pretrained: weights of the linear layers before any task.
    """

    settings_class: type[LoraSettings] = LoraSettings

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: LoraSettings):
        super().__init__(clip, processor, settings)
        self.loras: list[dict[str, tuple[Tensor, Tensor]]] = []
        self.pretrained = {
            layer: linear.weight.detach().clone()
            for layer, linear in clip.named_modules()
            if isinstance(linear, nn.Linear) and layer.rpartition(".")[2] in TARGETS
        }

    def start(self) -> Changes:
        """Return what a new task starts from, here the sum of all LoRAs; with no LoRA so far it is not asked."""
        return self.summed()

    def merged(self) -> Changes:
        """Return what is tested when a task has ended, here the sum of all LoRAs."""
        return self.summed()

    def changes(self, layer: str) -> list[Tensor]:
        """Multiply out what each LoRA adds to a layer, in the order of the tasks."""
        return [up_OR @ down_RF for down_RF, up_OR in (lora[layer] for lora in self.loras)]

    def summed(self) -> Changes:
        """Sum all LoRAs, multiplied out."""
        return {layer: sum(self.changes(layer)) for layer in self.pretrained}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.loras:
            self._change_weights(self.start())
        self.model = get_peft_model(self.model, lora_config(self.settings.lora_r, self.settings.use_rslora))

    def layers(self) -> dict[str, LoraLayer]:
        """Return the linear layers with the LoRA that is being trained."""
        modules = self.model.get_base_model().named_modules()
        return {layer: module for layer, module in modules if isinstance(module, LoraLayer)}

    def learning_rate(self, lr: float) -> float:
        return self.settings.lora_lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return self.settings.parameter_groups(self.model, lr)

    @torch.no_grad()
    def end_task(self) -> None:
        kept = {}
        for layer, lora in self.layers().items():
            up_OR = lora.scaling["default"] * lora.lora_B["default"].weight
            kept[layer] = (lora.lora_A["default"].weight.cpu().clone(), up_OR.cpu())
        self.loras.append(kept)
        self.model = self.model.unload()
        self._change_weights(self.merged())

    @torch.no_grad()
    def _change_weights(self, changes: Changes) -> None:
        for layer, change_OF in changes.items():
            weight = self.model.get_submodule(layer).weight
            weight.copy_(self.pretrained[layer] + change_OF.to(self.pretrained[layer]))

    def save(self, folder: Path) -> None:
        factors = {}
        for position in range(len(self.loras)):
            factors |= {f"{position}.{name}": factor for name, factor in self._factors(position).items()}
        save_file(factors, folder / "loras.safetensors")

    def save_so_far(self, folder: Path) -> None:
        """Write the LoRAs that were not written before: none changes once its task has ended."""
        write_finished(folder, len(self.loras), self._factors)

    def load(self, folder: Path) -> None:
        whole = folder / "loras.safetensors"
        if whole.exists():  # in the last checkpoint, and in those of older releases
            factors = load_file(whole)
        else:
            parts = [load_file(file) for file in sorted((folder / FINISHED).iterdir())]
            factors = {
                f"{position}.{name}": factor for position, own in enumerate(parts) for name, factor in own.items()
            }
        count = len({name.partition(".")[0] for name in factors})
        self.loras = [
            {
                layer: (factors[f"{position}.{layer}.down"], factors[f"{position}.{layer}.up"])
                for layer in self.pretrained
            }
            for position in range(count)
        ]
        self._change_weights(self.merged())

    def _factors(self, position: int) -> dict[str, Tensor]:
        both = self.loras[position].items()
        return {
            f"{layer}.{kind}": factor
            for layer, lora in both
            for kind, factor in zip(("down", "up"), lora, strict=True)
        }
