"""One LoRA in sequence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .base import Method, Settings

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""All linear layers of both towers' blocks; CLIP's two projections stay as they are."""


def lora_config(r: int, use_rslora: bool = False) -> LoraConfig:
    """Make PEFT's LoRA (Hu et al., arXiv 2106.09685) of this rank for CLIP's blocks, scaled by 1, or by the root of the rank."""
    return LoraConfig(r=r, lora_alpha=r, use_rslora=use_rslora, target_modules=TARGETS)


@dataclass
class LowRankSettings(Settings):
    """Of all methods with low-rank updates."""

    use_rslora: bool = setting(False, "scale low-rank updates by 1 / sqrt(rank) (rsLoRA)")
    loraplus_ratio: float = setting(1.0, "second matrices learn so many times as fast as all else (LoRA+)")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "loraplus_ratio")


@dataclass
class LoraSettings(LowRankSettings):
    """Of methods with PEFT's LoRA."""

    lora_r: int = setting(16, "rank of a LoRA")
    lora_lr: float = setting(5e-3, "peak learning rate of a LoRA")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "lora_r")
        check_positive(self, "lora_lr")

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Let the second matrices learn faster than the first (LoRA+, arXiv 2402.12354)."""
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        second = [p for name, p in trained if ".lora_B." in name]
        others = [p for name, p in trained if ".lora_B." not in name]
        return [{"params": others, "lr": lr}, {"params": second, "lr": lr * self.loraplus_ratio}]


class Lora(Method):
    """The same low-rank adapter, PEFT's own, learns each task in turn."""

    name = "lora"
    settings_class = LoraSettings

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not isinstance(self.model, PeftModel):
            self.model = get_peft_model(self.model, lora_config(self.settings.lora_r, self.settings.use_rslora))

    def learning_rate(self, lr: float) -> float:
        return self.settings.lora_lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return self.settings.parameter_groups(self.model, lr)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.model = PeftModel.from_pretrained(self.model, folder, is_trainable=True)
