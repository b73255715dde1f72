"""One LoRA in sequence."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from ..data.task import Task
from .base import Method

TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""All linear layers of both towers' blocks; CLIP's two projections stay as they are."""


def lora_config(r: int) -> LoraConfig:
    """Make PEFT's LoRA (Hu et al., arXiv 2106.09685) of this rank, unscaled, for CLIP's blocks."""
    return LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)


class Lora(Method):
    """The same low-rank adapter, PEFT's own, learns each task in turn."""

    name = "lora"

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
