"""Which peak learning rate, and which shape of an expert pool, suit best, on images that are neither trained on nor tested on.

    python benchmarks/learning_rates.py [--steps 60] [--tasks aerial digits food] [--seeds 0 1]
    python benchmarks/learning_rates.py --suite <folder> --model <CLIP> --tasks ...    # on images of your own
    python benchmarks/learning_rates.py --stream --methods coda_prompt sema            # one task after another
    python benchmarks/learning_rates.py --stream --methods "lora rate" "o_lora rate" "magmax rate" "finetune rate"

A fifth of each task's training images is held out. Each task is learnt by itself, from the pretrained CLIP, at every point of a
grid; printed is the mean accuracy on the held-out images. The rates of experts and LoRAs that
`make demo` and docs/merging.md use were chosen so. With `--stream` the tasks are learnt one after another, and tested in the end:
for methods whose tasks share weights, which at the rate that is best for one task may forget all others.
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

RATES = (2.5e-3, 5e-3, 1e-2)
# o_lora, lora_soup and magmax learn a first task just as lora does, der_pp nearly as finetune does
GRID: dict[str, list[dict[str, Any]]] = {
    "moe_adapters": [{"lr": lr} for lr in (5e-3, 1e-2, 2e-2, 4e-2)],
    "lora": [{"lora_lr": lr} for lr in (2.5e-3, 5e-3, 1e-2)],
    "finetune": [{"full_lr": lr} for lr in (2.5e-4, 5e-4, 1e-3)],
    "inflora": [{"inflora_lr": lr} for lr in (3e-4, 6e-4, 1.25e-3, 2.5e-3, 5e-3, 1e-2)],
    "rail": [{"rail_ridge": ridge} for ridge in (1e-3, 1e-2, 1e-1, 1.0, 10.0)],
    "coda_prompt": [{"coda_lr": lr, "coda_weight": 0.0} for lr in (2e-2, 4e-2, 8e-2, 1.6e-1, 3.2e-1, 6.4e-1)],
    "coda_prompt orthogonal": [{"coda_lr": lr, "coda_weight": 0.1} for lr in (4e-2, 8e-2, 1.6e-1, 3.2e-1, 6.4e-1)],
    "sema": [{"sema_lr": lr} for lr in (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)],
    "moe_lora_warm": [{"warm_lr": lr} for lr in RATES],  # by --stream: it has to come after other tasks
    "moe_lora_pool": [
        {"experts_per_task": experts, "pool_r": r, "pool_lr": lr}
        for experts, r in ((1, 16), (2, 8), (2, 16))
        for lr in (2.5e-3, 5e-3, 1e-2)
    ],
}

# how the few steps of a task are best used; LoRA+ names its ratio, rsLoRA scales by the root of the rank
BUDGET: dict[str, list[dict[str, Any]]] = {
    f"{name} budget": [
        *({rate: lr, "loraplus_ratio": ratio} for ratio in (4.0, 16.0) for lr in RATES),
        *({rate: lr, "use_rslora": True} for lr in RATES),
        *({rate: lr, "schedule": schedule} for schedule in ("linear", "constant_with_warmup") for lr in RATES[1:]),
        *({rate: lr, "warmup_steps": 0} for lr in RATES[1:]),
    ]
    for name, rate in (("moe_lora_pool", "pool_lr"), ("lora", "lora_lr"))
}
BUDGET["moe_lora_pool rate"] = [{"pool_lr": lr} for lr in RATES]  # in the shape that the preset has
# by --stream: where tasks share weights, the rate that is best for one task may forget all others
BUDGET |= {
    f"{name} rate": [{"lora_lr": lr} for lr in (6e-4, 1.25e-3, *RATES)] for name in ("lora", "o_lora", "magmax")
}
BUDGET["finetune rate"] = [{"full_lr": lr} for lr in (6e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3)]
OF_THE_STREAM = ("lr", "schedule", "warmup_steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--model", default=str(mini_clip_path()))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_experts", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=["aerial", "digits", "food"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=[*GRID, *BUDGET])
    parser.add_argument("--stream", action="store_true", help="learn the tasks one after another, then test them")
    options = parser.parse_args()

    accelerator = Accelerator()
    held_out = []
    for task in load_suite(options.suite, options.tasks):
        parts = task.train.train_test_split(test_size=0.2, seed=0, stratify_by_column="label")
        held_out.append(replace(task, train=parts["train"], test=parts["test"]))

    table = Table(title=f"{options.steps} steps: held-out accuracy in %, mean over seeds, ± Student's 95 % interval")
    for column in ("method", "settings", *options.tasks, "mean"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for name in options.methods:
        for tried in {**GRID, **BUDGET}[name]:
            of_stream = {key: tried[key] for key in OF_THE_STREAM if key in tried}
            of_stream["lr"] = [tried.get("lr", 1e-3)]
            training = StreamSettings(steps=options.steps, batch_size=options.batch_size, **of_stream)
            own = {key: value for key, value in tried.items() if key not in OF_THE_STREAM}
            settings = MethodSettings(num_experts=options.num_experts, **own)
            accuracies = []
            for seed in options.seeds:
                accuracies.append([])
                for tasks in [held_out] if options.stream else [[task] for task in held_out]:
                    set_seed(seed)
                    method = METHODS[name.partition(" ")[0]](*load_clip(options.model), settings)
                    stream = Stream(tasks, training, accelerator)
                    for position in range(len(tasks)):
                        stream.train(method, position, seed, Progress({}))
                    accuracies[-1] += [stream.accuracy(method, task) for task in tasks]
            columns = [*zip(*accuracies, strict=True), [sum(row) / len(row) for row in accuracies]]
            shown = ", ".join(f"{key} {value}" for key, value in tried.items())
            table.add_row(name, shown, *(spread(estimate(column)) for column in columns))
            print(name, tried, accuracies, flush=True)
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
