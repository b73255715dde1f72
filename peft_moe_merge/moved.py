"""Module paths of earlier releases, which go on working: importing one warns and gives the module where it is now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TUNER = "tuners.moe_lora_merge"
MOVED = {
    "callback": "callbacks.expert_merge",
    "classifier": "inference.classifier",
    "experts": f"{TUNER}.mixture",
    "export": "inference.export",
    "merging": f"{TUNER}.pool",
    "registration": "tuners.registration",
    "router_freeze": "callbacks.router_freeze",
    "routing": f"{TUNER}.routing",
    "routing_losses": f"{TUNER}.routing_losses",
    "routing_stop": f"{TUNER}.routing_stop",
    "static_merges": "model_merging.static",
    "task_callback": "callbacks.base",
    "whole": "files",
    "tuners.wemoe.finetuned": "model_merging.finetuned",
    "tuners.wemoe.zero_shot": "model_merging.logits",
    f"{TUNER}.tasks": f"{TUNER}.context",
    f"{TUNER}.two_towers": f"{TUNER}.clip_forward",
}
"""Old module -> new module, both below this package."""


class _MovedModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == __package__ and module in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"`{spec.name}` is now `{new}`.", FutureWarning, stacklevel=2)
        return importlib.import_module(new)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module has run where it is now."""


def serve_moved_modules() -> None:
    """Let imports of the old paths find the new modules. Once a process is enough."""
    if not any(type(finder).__name__ == _MovedModules.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
