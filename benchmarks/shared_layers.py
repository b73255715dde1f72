"""Does it hurt when tasks share the experts of some layers? Of none, of the first half of both towers, of all layers.

    python benchmarks/shared_layers.py --seeds 0 1 2 [--output_dir runs/shared_layers]

The expert pool learns the embedded benchmark's 11 tasks. In a layer that is shared all tasks take the first task's experts,
which go on learning with each of them, by routers of their own; in the others a task has experts of its own, as always. A
task trains the same number of parameters in all cases. An interrupted study goes on where it was.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from variants import run_variants

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import StreamSettings
from peft_moe_merge.report.statistics import RULE, estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import difference, spread

STREAM = StreamSettings(steps=60, batch_size=32, lr=[1e-2])
NONE = "none"
SHARED: dict[str, Callable[[float], bool]] = {
    NONE: lambda depth: False,
    "first half": lambda depth: depth < 0.5,
    "all": lambda depth: True,
}
"""Which layers are shared, by where their block is in its tower: 0 is the first, and 1 would come after the last."""


class SharedPool(METHODS["moe_lora_pool"]):
    """The expert pool, some of whose layers have one set of experts for all tasks."""

    shared = NONE

    def is_shared(self, layer: str) -> bool:
        """Tell whether the tasks share a layer's experts."""
        configs = self.model.get_base_model().config
        config = configs.text_config if layer.startswith("text_model.") else configs.vision_config
        block = int(layer.partition(".layers.")[2].partition(".")[0])
        return SHARED[self.shared](block / config.num_hidden_layers)

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.model.set_task(None)  # so that the experts made for the task, where it takes the first's, do not train
        for layer, routers in self.model.router_banks().items():
            if self.is_shared(layer):
                first = routers.experts_of(0)
                routers.columns.set(len(self.learnt) - 1, first)
                self.model.expert_banks()[layer].frozen[first] = False
        self.model.set_task(task.name)

    def save_so_far(self, folder: Path) -> None:
        self.save(folder)  # no task is over: the experts that it shares go on learning


def print_study(results: dict[str, Any]) -> None:
    """Print a row per case: accuracies, and paired differences to sharing nothing."""
    table = Table(
        title="Layers whose experts all tasks share",
        caption=f"Percent, means over seeds. {RULE} Δ: paired difference to sharing none.",
    )
    for column in ("shared", "seeds", "Average", "Δ Average", "Last", "Δ Last", "forgetting"):
        table.add_column(column, justify="left" if column == "shared" else "right")
    for name, runs in results["methods"].items():
        row = [name, str(len(runs))]
        for metric in ("average", "last"):
            row.append(spread(over_seeds(runs, metric), 2))
            own = paired_differences(runs, results["methods"][NONE], metric)
            row.append("" if name == NONE else difference(estimate(own)))
        table.add_row(*row, spread(over_seeds(runs, "forgetting"), 2))
    Console(width=120).print(table)


def build(shared: str) -> SharedPool:
    """Make a pool that shares these layers."""
    pool = type("SharedPool", (SharedPool,), {"shared": shared})
    return pool(*load_clip(mini_clip_path()), MethodSettings())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/shared_layers"))
    options = parser.parse_args()

    variants = {name: partial(build, name) for name in SHARED}
    results = run_variants(variants, STREAM, options.seeds, options.output_dir)
    print_study(results)


if __name__ == "__main__":
    main()
