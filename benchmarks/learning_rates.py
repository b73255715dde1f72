"""Which peak learning rate, and which shape of an expert pool, suit best, on images that are neither trained on nor tested on.

    python benchmarks/learning_rates.py [--steps 60] [--tasks aerial digits food] [--seeds 0 1]

A fifth of each task's training images is held out. Each task is learnt by itself, from the pretrained CLIP, at every point of a
grid; printed is the mean accuracy on the held-out images. The rates of experts and LoRAs that
`make demo` and docs/merging.md use were chosen so.
"""

import argparse
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings
from peft_moe_merge.report.statistics import estimate
from peft_moe_merge.report.tables import spread

GRID: dict[str, list[dict[str, Any]]] = {
    "moe_adapters": [{"lr": lr} for lr in (5e-3, 1e-2, 2e-2, 4e-2)],
    "lora": [{"lora_lr": lr} for lr in (2.5e-3, 5e-3, 1e-2)],
    "finetune": [{"full_lr": lr} for lr in (2.5e-4, 5e-4, 1e-3)],
    "moe_lora_pool": [
        {"experts_per_task": experts, "pool_r": r, "pool_lr": lr}
        for experts, r in ((1, 16), (2, 8), (2, 16))
        for lr in (2.5e-3, 5e-3, 1e-2)
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_experts", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=["aerial", "digits", "food"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=list(GRID))
    options = parser.parse_args()

    accelerator = Accelerator()
    held_out = []
    for task in load_suite("mini", options.tasks):
        parts = task.train.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
        held_out.append(replace(task, train=parts["train"], test=parts["test"]))

    table = Table(title=f"{options.steps} steps: held-out accuracy in %, mean over seeds, ± Student's 95 % interval")
    for column in ("method", "settings", *options.tasks, "mean"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in options.methods:
        for tried in GRID[name]:
            rates = [tried["lr"]] if "lr" in tried else [1e-3]
            training = StreamSettings(steps=options.steps, batch_size=options.batch_size, lr=rates)
            own = {key: value for key, value in tried.items() if key != "lr"}
            settings = MethodSettings(num_experts=options.num_experts, **own)
            accuracies = []
            for seed in options.seeds:
                accuracies.append([])
                for task in held_out:
                    set_seed(seed)
                    method = METHODS[name](*load_clip(mini_clip_path()), settings)
                    stream = Stream([task], training, accelerator)
                    stream.train(method, 0, seed, Progress({}))
                    accuracies[-1].append(stream.accuracy(method, task))
            columns = [*zip(*accuracies, strict=True), [sum(row) / len(row) for row in accuracies]]
            shown = ", ".join(f"{key} {value:g}" for key, value in tried.items())
            table.add_row(name, shown, *(spread(estimate(column)) for column in columns))
            print(name, tried, accuracies, flush=True)
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
