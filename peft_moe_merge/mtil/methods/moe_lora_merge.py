"""Ours: a mixture of LoRA experts with one router per task; experts merge while a task trains and freeze when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback
from peft_moe_merge.callbacks.base import TaskCallback

from ..data.batches import Batch
from ..data.task import Task
from .base import Method, MethodSettings


class MoELoraMerge(Method):
    """Arriving at a task adds its routers; at test time the task's own routers route, and plain CLIP where it has none."""

    name = "moe_lora_merge"

    @property
    def merge_every(self) -> int | None:
        """Optimizer steps between merges; None never merges."""
        return self.settings.merge_every

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: MethodSettings):
        super().__init__(clip, processor, settings)
        self.merging = ExpertMergeCallback(self.merge_every, settings.freeze_top_k)
        self.callbacks: list[TaskCallback] = [self.merging]
        if settings.router_gap is not None:
            self.callbacks.append(RouterFreezeCallback(gap=settings.router_gap, explore=settings.merge_every))
        elif settings.router_stop is not None:
            self.callbacks.append(RouterFreezeCallback(at_step=settings.router_stop))
        self.learnt: list[str] = []

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if not isinstance(self.model, PeftModel):
            names = (
                "num_experts",
                "top_k",
                "r",
                "merge_strategy",
                "merge_pair",
                "merge_router_columns",
                "router_balance_loss",
                "router_locality_loss",
            )
            config = MoELoraMergeConfig(tasks=[task.name], **{name: getattr(self.settings, name) for name in names})
            self.model = get_peft_model(self.model, config)
        else:
            self.model.add_task(task.name)
        self.model.set_task(task.name)
        for callback in self.callbacks:
            callback.begin_task(self.model)
        self.learnt.append(task.name)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        if self.settings.router_balance_loss or self.settings.router_locality_loss:
            loss = loss + self.model.auxiliary_loss()
        return loss

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        for callback in self.callbacks:
            callback.step(self.model, optimizer)

    def end_task(self) -> None:
        for callback in self.callbacks:
            callback.end_task(self.model)

    def prepare_evaluation(self, task: Task) -> None:
        self.model.set_task(task.name if task.name in self.learnt else None)

    def story(self) -> dict[str, Any]:
        return {
            "merges": self.merging.merges,
            "frozen": self.model.frozen_experts(),
            "usage": {block: counts_E.tolist() for block, counts_E in self.model.expert_usage().items()},
        }

    def save(self, folder: Path) -> None:
        self.model.set_task(self.learnt[-1])
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.model = PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        self.learnt = list(self.model.peft_config["default"].tasks)
