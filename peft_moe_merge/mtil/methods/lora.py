"""One LoRA in sequence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from ..data.task import Task
from ..settings import check_at_least, check_positive, setting
from .base import Method, Settings

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""All linear layers of both towers' blocks; CLIP's two projections stay as they are."""


def lora_config(r: int) -> LoraConfig:
    """Make PEFT's LoRA (Hu et al., arXiv 2106.09685) of this rank, unscaled, for CLIP's blocks."""
    return LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)


@dataclass
class LoraSettings(Settings):
    """Of methods with PEFT's LoRA."""

    lora_r: int = setting(16, "rank of a LoRA")
    lora_lr: float = setting(5e-3, "peak learning rate of a LoRA")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "lora_r")
        check_positive(self, "lora_lr")


class Lora(Method):
    """The same low-rank adapter, PEFT's own, learns each task in turn."""

    name = "lora"
    settings_class = LoraSettings

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not isinstance(self.model, PeftModel):
            self.model = get_peft_model(self.model, lora_config(self.settings.lora_r))

    def learning_rate(self, lr: float) -> float:
        return self.settings.lora_lr

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.model = PeftModel.from_pretrained(self.model, folder, is_trainable=True)
