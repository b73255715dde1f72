"""What we recommend: every task gets a few linear experts of its own, beside all linear layers; the pool grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.optimizer import loraplus_groups
from peft_moe_merge.tuners.moe_lora_merge.parts import comes_in_parts, load_parts, part_of

from ..checkpoint import finished_file, write_finished
from ..data.task import Task
from ..settings import check_at_least, check_choices, check_positive, setting
from .lora import LowRankSettings
from .moe_lora_merge import RoutedByTask

UNFINISHED = "unfinished"
"""The folder in a checkpoint with the configuration of an adapter that is not whole; PEFT is not to take it for one."""


@dataclass
class PoolSettings(LowRankSettings):
    """Of the expert pool: what differs from `MoELoraMergeConfig.pool()`."""

    experts_per_task: int = setting(
        2, "moe_lora_pool: experts of its own that a task gets per layer, all of which it takes"
    )
    max_experts: int | None = setting(
        None, "moe_lora_pool: bound of the pool; a full one merges its most alike experts"
    )
    pool_strategy: Literal["average", "aligned", "product", "keep_used"] = setting(
        "product", "moe_lora_pool: how two experts of a full pool become one"
    )
    pool_pair: Literal["most_similar", "random"] = setting("most_similar", "moe_lora_pool: which two do")
    pool_r: int = setting(8, "moe_lora_pool: rank of an expert")
    pool_lr: float = setting(1e-2, "moe_lora_pool: peak learning rate")

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 1, "experts_per_task", "pool_r")
        check_positive(self, "pool_lr")
        check_choices(self, "pool_strategy")
        check_choices(self, "pool_pair")
        self.config(["any"])  # the tuner checks what is its own

    def config(self, tasks: list[str]) -> MoELoraMergeConfig:
        """Return the tuner's configuration for these tasks."""
        return MoELoraMergeConfig.pool(
            tasks=tasks,
            experts_per_task=self.experts_per_task,
            top_k=self.experts_per_task,
            max_experts=self.max_experts,
            r=self.pool_r,
            lora_alpha=float(self.pool_r),
            merge_strategy=self.pool_strategy,
            merge_pair=self.pool_pair,
            use_rslora=self.use_rslora,
        )


class MoELoraPool(RoutedByTask):
    """The tuner's preset. A task learns with experts that nobody else has; they freeze when it ends.

    Experts merge only where `max_experts` bounds the pool, to make room for the next task.
    """

    name = "moe_lora_pool"
    settings_class = PoolSettings

    def __init__(self, clip: CLIPModel, processor: CLIPProcessor, settings: Any):
        super().__init__(clip, processor, settings)
        self.merging = ExpertMergeCallback(None, self.settings.experts_per_task)
        self.callbacks = [self.merging]

    @property
    def routes_stay(self) -> bool:
        """Whether no old experts ever merge."""
        return self.settings.max_experts is None

    @classmethod
    def check(cls, settings: Any, tasks: Sequence[Task]) -> None:
        own, bound = settings.experts_per_task, settings.max_experts
        if bound is not None and len(tasks) > 1 and bound <= own:
            raise ValueError(
                f"max_experts={bound} leaves old tasks none while a new one has experts_per_task={own}: raise `max_experts` to "
                f"{own + 1} at least, or lower `experts_per_task`."
            )

    def learning_rate(self, lr: float) -> float:
        return self.settings.pool_lr

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        return loraplus_groups(self.model, lr, self.settings.loraplus_ratio)

    def save_so_far(self, folder: Path) -> None:
        """Write the tasks that were not written before: without a bound nothing of a task changes once it has ended."""
        self.set_task(self.learnt[-1])
        config = self.model.peft_config["default"]
        if not comes_in_parts(config):
            self.save(folder)
            return
        write_finished(
            folder, len(self.learnt), lambda position: part_of(self.model.base_model, self.learnt[position])
        )
        config.save_pretrained(folder / UNFINISHED)

    def load(self, folder: Path) -> None:
        if (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            # the last checkpoint, one of a bounded pool, or of an older release
            super().load(folder)
            return
        config = MoELoraMergeConfig.from_pretrained(folder / UNFINISHED)
        self.learnt = list(config.tasks)
        files = [finished_file(folder, position) for position in range(len(self.learnt))]
        self.model = load_parts(self.model, config, files)

    def history(self) -> dict[str, Any]:
        # which experts a task takes is no news: all of its own
        return {"experts": len(next(iter(self.model.expert_banks().values()))), **self.watched()}
