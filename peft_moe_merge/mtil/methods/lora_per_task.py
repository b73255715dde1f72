"""One LoRA per task, chosen by hand: the ceiling."""

# B images, F features, P projection width

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from peft_moe_merge.selection import NONE, FeatureSource

from ..checkpoint import finished_file, write_finished
from ..data.task import Task
from .base import Method
from .lora import LoraSettings, lora_config


class LoraPerTask(Method):
    """A fresh LoRA learns each task from plain CLIP. At test time the true task is known and takes its own.

    No task can disturb another, so nothing is forgotten and nothing is gained; a task not learnt yet gets plain CLIP. With
    selectors these choose whose LoRA an image takes, as they choose routers.

    Attributes:
        learnt: the tasks so far.
        current: the task whose LoRA encodes; None for plain CLIP.
    """

    name = "lora_per_task"
    settings_class = LoraSettings
    routes_stay = True

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.learnt: list[str] = []
        self.current: str | None = None

    def adapter(self, task: str) -> str:
        """Name a task's adapter: by position, since PEFT allows no dot in a name."""
        return f"task_{self.learnt.index(task)}"

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.learnt.append(task.name)
        self._add_adapter(self.adapter(task.name))
        self.set_task(task.name)

    def _add_adapter(self, name: str) -> None:
        config = lora_config(self.settings.lora_r, self.settings.use_rslora)
        if not isinstance(self.model, PeftModel):
            self.model = get_peft_model(self.model, config, adapter_name=name)
        else:
            self.model.add_adapter(name, config)

    def prepare_evaluation(self, task: Task) -> None:
        self.set_task(task.name if task.name in self.learnt else None)

    def set_task(self, task: str | None) -> None:
        if task is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(self.adapter(task))
        self.current = task

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        with self.model.disable_adapter():
            return source(self.model.get_base_model(), pixel_values)

    def routed_image_features(self, pixel_values: Tensor, task_ids: Tensor) -> Tensor:
        before, found = self.current, {}
        for task in task_ids.unique().tolist():
            self.set_task(None if task == NONE else self.learnt[task])
            rows = (task_ids == task).nonzero().flatten()
            found |= zip(rows.tolist(), super().image_features(pixel_values[rows]), strict=True)
        self.set_task(before)
        return torch.stack([found[row] for row in range(len(task_ids))])

    def learning_rate(self, lr: float) -> float:
        return self.settings.lora_lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return self.settings.parameter_groups(self.model, lr)

    def save(self, folder: Path) -> None:
        self.set_task(self.learnt[-1])
        self.model.save_pretrained(folder)  # each adapter in a folder of its own
        (folder / "learnt.json").write_text(json.dumps(self.learnt))

    def save_so_far(self, folder: Path) -> None:
        """Write the LoRAs that were not written before: none changes once its task has ended."""
        self.set_task(self.learnt[-1])
        adapters = list(map(self.adapter, self.learnt))
        write_finished(
            folder,
            len(adapters),
            lambda position: get_peft_model_state_dict(self.model, adapter_name=adapters[position]),
        )
        (folder / "learnt.json").write_text(json.dumps(self.learnt))

    def load(self, folder: Path) -> None:
        self.learnt = json.loads((folder / "learnt.json").read_text())
        for position, name in enumerate(map(self.adapter, self.learnt)):
            self._add_adapter(name)
            file = folder / name / SAFETENSORS_WEIGHTS_NAME  # in the last checkpoint, and in those of older releases
            weights = load_file(file if file.exists() else finished_file(folder, position))
            set_peft_model_state_dict(self.model, weights, adapter_name=name)
        self.current = self.learnt[0]
