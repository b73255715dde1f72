"""The benchmark's 11 data sets, from the Hub."""

from __future__ import annotations

from typing import Any

from ..hub.load import load_hub_task
from ..hub.table import HUB_SETS, ORDER_II
from ..task import Task
from .base import Suite


class Mtil(Suite):
    """MTIL (arXiv 2303.06628): Aircraft to SUN397."""

    name = "mtil"
    second_order = ORDER_II

    def task_names(self) -> list[str]:
        return list(HUB_SETS)

    def load_task(self, name: str, settings: Any) -> Task:
        return load_hub_task(
            name,
            data_dir=settings.data_dir,
            allow_size_mismatch=settings.allow_size_mismatch,
            few_shot=settings.few_shot is not None,
        )
