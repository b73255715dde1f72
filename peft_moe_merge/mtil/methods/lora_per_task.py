"""One LoRA per task, chosen by hand: the ceiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model

from ..data.task import Task
from .base import Method
from .lora import LoraSettings, lora_config


class LoraPerTask(Method):
    """A fresh LoRA learns each task from plain CLIP. At test time the true task is known and takes its own.

    No task can disturb another, so nothing is forgotten and nothing is gained; a task not learnt yet gets plain CLIP.
    """

    name = "lora_per_task"
    settings_class = LoraSettings

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.learnt: list[str] = []

    def adapter(self, task: str) -> str:
        """Name a task's adapter: by position, since PEFT allows no dot in a name."""
        return f"task_{self.learnt.index(task)}"

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.learnt.append(task.name)
        name, config = self.adapter(task.name), lora_config(self.settings.lora_r, self.settings.use_rslora)
        if not isinstance(self.model, PeftModel):
            self.model = get_peft_model(self.model, config, adapter_name=name)
        else:
            self.model.add_adapter(name, config)
        self._switch_to(task.name)

    def prepare_evaluation(self, task: Task) -> None:
        self._switch_to(task.name)

    def _switch_to(self, task: str) -> None:
        if task in self.learnt:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.adapter(task))
        else:
            self.model.base_model.disable_adapter_layers()

    def learning_rate(self, lr: float) -> float:
        return self.settings.lora_lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return self.settings.parameter_groups(self.model, lr)

    def save(self, folder: Path) -> None:
        self._switch_to(self.learnt[-1])
        self.model.save_pretrained(folder)  # each adapter in a folder of its own
        (folder / "learnt.json").write_text(json.dumps(self.learnt))

    def load(self, folder: Path) -> None:
        self.learnt = json.loads((folder / "learnt.json").read_text())
        first, *others = (self.adapter(task) for task in self.learnt)
        self.model = PeftModel.from_pretrained(self.model, folder / first, adapter_name=first)
        for name in others:
            self.model.load_adapter(folder / name, name)
