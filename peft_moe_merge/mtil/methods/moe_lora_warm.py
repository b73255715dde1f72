"""The expert pool, where a new task's experts start from those of the tasks before, merged."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft_moe_merge import MoELoraMergeConfig

from ..settings import check_positive, setting
from .moe_lora_pool import MoELoraPool, PoolSettings


@dataclass
class WarmSettings(PoolSettings):
    """Of the expert pool that starts from merged experts: those of `moe_lora_pool`, and a rate of its own."""

    warm_lr: float = setting(5e-3, "moe_lora_warm: peak learning rate")

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "warm_lr")

    def config(self, tasks: list[str]) -> MoELoraMergeConfig:
        return replace(super().config(tasks), expert_start="merged")


class MoELoraWarm(MoELoraPool):
    """The same as `moe_lora_pool`, but what was learnt before is where a task begins. Old tasks are not touched."""

    name = "moe_lora_warm"
    settings_class = WarmSettings

    def learning_rate(self, lr: float) -> float:
        return self.settings.warm_lr
