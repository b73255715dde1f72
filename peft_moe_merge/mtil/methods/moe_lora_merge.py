"""Ours: a mixture of LoRA experts with one router per task; experts merge while a task trains and freeze when it ends."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback
from peft_moe_merge.callbacks.base import TaskCallback
from peft_moe_merge.selection import FeatureSource

from ..data.batches import Batch
from ..data.task import Task
from ..expert_watch import ExpertWatch
from ..settings import borrowed, check_at_least, check_positive, setting
from .base import Method, Settings

TUNER_OPTIONS = (
    "top_k",
    "r",
    "merge_strategy",
    "merge_pair",
    "merge_routing",
    "router_balance_loss",
    "router_locality_loss",
)
"""Fields of `MoELoraMergeConfig` that are settings here too, with its types, defaults and explanations."""

TunerSettings = make_dataclass("TunerSettings", borrowed(MoELoraMergeConfig, TUNER_OPTIONS), bases=(Settings,))


@dataclass
class MixtureSettings(TunerSettings):
    """Of methods with a mixture of LoRA experts: the tuner's, and when experts merge and freeze and routers stop."""

    num_experts: int = setting(55, "experts per block, shared by all tasks")
    merge_every: int = setting(100, "optimizer steps between merges of experts")
    freeze_top_k: int = setting(2, "experts that freeze per block when a task ends")
    router_stop: int | None = setting(None, "steps of a task after which its routers train no more")
    router_gap: float | None = setting(None, "stop each router by the gate-gap test with this threshold instead")
    router_explore: int = setting(100, "steps of a task before the gate-gap test of --router_gap begins")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "merge_every")
        check_at_least(self, 0, "freeze_top_k", "router_stop", "router_explore")
        if self.router_gap is not None:
            check_positive(self, "router_gap")
        self.config(["any"])  # the tuner checks what is its own

    def config(self, tasks: list[str]) -> MoELoraMergeConfig:
        """Return the tuner's configuration for these tasks."""
        options = {name: getattr(self, name) for name in ("num_experts", *TUNER_OPTIONS)}
        return MoELoraMergeConfig(tasks=tasks, **options)


class RoutedByTask(Method):
    """Methods of our tuner. Arriving at a task adds its routers; at test time the task's own routers route, and plain CLIP
    where it has none.

    Attributes:
        callbacks: act when a task begins, after its steps and when it ends.
        merging: the one of them that merges and freezes experts.
        learnt: the tasks so far.
        watch: notes what the experts do, for pictures; None notes nothing.
    """

    merging: ExpertMergeCallback

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: Any):
        super().__init__(clip, processor, settings)
        self.callbacks: list[TaskCallback] = []
        self.learnt: list[str] = []
        self.watch: ExpertWatch | None = None

    def watch_experts(self) -> None:
        """Note from now on what the experts do; `history` tells it. What is learnt stays the same."""
        self.watch = ExpertWatch()

    def _watched(self) -> AbstractContextManager[None]:
        """What happens in it may merge experts."""
        return nullcontext() if self.watch is None else self.watch.merging(self.model)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        new = not isinstance(self.model, PeftModel)
        if new:
            self.model = get_peft_model(self.model, self.settings.config([task.name]))
        if self.watch is not None:
            self.watch.begin_task(self.model, task.train, self.processor.image_processor)
        if not new:
            with self._watched():
                self.model.add_task(task.name)
        self.model.set_task(task.name)
        for callback in self.callbacks:
            callback.begin_task(self.model)
        self.learnt.append(task.name)

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        with self._watched():
            for callback in self.callbacks:
                callback.step(self.model, optimizer)
        if self.watch is not None:
            self.watch.step(self.model)

    def end_task(self) -> None:
        for callback in self.callbacks:
            callback.end_task(self.model)

    def prepare_evaluation(self, task: Task) -> None:
        self.set_task(task.name if task.name in self.learnt else None)

    def set_task(self, task: str | None) -> None:
        self.model.set_task(task)

    def frozen_features(self, source: FeatureSource, pixel_values: Tensor) -> Tensor:
        return self.model.frozen_features(source, pixel_values)

    def routed_image_features(self, pixel_values: Tensor, task_ids: Tensor) -> Tensor:
        output = self.model.get_image_features(pixel_values, task_ids=task_ids)
        return F.normalize(output.pooler_output.float(), dim=-1)

    def history(self) -> dict[str, Any]:
        return {
            "merges": self.merging.merges,
            "frozen": self.model.frozen_experts(),
            "usage": {block: counts_E.tolist() for block, counts_E in self.model.expert_usage().items()},
            **self.watched(),
        }

    def watched(self) -> dict[str, Any]:
        """Tell what was noted of the experts in the task just ended; nothing where nothing was."""
        return {} if self.watch is None else self.watch.history(self.model)

    def save(self, folder: Path) -> None:
        self.model.set_task(self.learnt[-1])
        self.model.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.model = PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        self.learnt = list(self.model.peft_config["default"].tasks)

    def change_processes(self, before: int, now: int) -> None:
        # each process counts for all prompts, while each image is one's
        for name, routers in self.model.router_banks().items():
            if self.model.adapted_layers()[name].reads_prompts:
                routers.usage.mul_(now).floor_divide_(before)


class MoELoraMerge(RoutedByTask):
    """The published method: shared experts, the two most used of which merge into the least used again and again."""

    name = "moe_lora_merge"
    settings_class = MixtureSettings

    @property
    def merge_every(self) -> int | None:
        """Optimizer steps between merges; None never merges."""
        return self.settings.merge_every

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: Any):
        super().__init__(clip, processor, settings)
        settings = self.settings
        self.merging = ExpertMergeCallback(self.merge_every, settings.freeze_top_k)
        self.callbacks = [self.merging]
        if settings.router_gap is not None:
            self.callbacks.append(RouterFreezeCallback(gap=settings.router_gap, explore=settings.router_explore))
        elif settings.router_stop is not None:
            self.callbacks.append(RouterFreezeCallback(at_step=settings.router_stop))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        if self.settings.router_balance_loss or self.settings.router_locality_loss:
            loss = loss + self.model.auxiliary_loss()
        return loss
