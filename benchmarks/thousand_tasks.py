"""What 1,000 tasks cost: a pool that learns up to 200 tasks for real, and what its measured curves come to further on.

    OMP_NUM_THREADS=1 python benchmarks/thousand_tasks.py --output runs/thousand_tasks     # about ten minutes on a free core
    python benchmarks/thousand_tasks.py --output runs/thousand_tasks --only_show           # table and figure of what is there
    python benchmarks/thousand_tasks.py --quick --output runs/thousand_tasks_quick         # to see that it runs

The mini CLIP and the pool's preset. A task is 32 images of one of the mini tasks, told apart among all classes of that; it
trains for a few steps by the benchmark's own method, and a checkpoint is written as the stream writes it. Started again, it
goes on after the last checkpoint.

After each task: the bytes of the adapter, those that the process holds, those that the checkpoint wrote and those that it
takes on the disk; the seconds to add the task, of a step (the median) and of the checkpoint. Seconds are the processor's, so
that others may use the machine, but those of the checkpoint, which are the clock's.

A straight line is fitted to each curve by least squares, over all tasks but the first ten. Shown are the line at 1,000
tasks, the standard deviation of the residuals, and the bend: the share of the value at the last task that a parabola adds to
the line there, with twice its standard error. What grows faster than linearly bends up.

Then the choice of the task: selectors are fitted to 25 up to 1,000 tasks of random features, and what choosing costs is
divided by a pass of the image tower over as many images, of the mini CLIP and of a ViT-B/16 with random weights.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate.utils import set_seed
from matplotlib.figure import Figure
from memory import process_bytes
from rich.console import Console
from rich.table import Table
from rounds import quartiles, ratios, take_turns, timed, write_json
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from peft_moe_merge.files import whole
from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import train_batches
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.report.plots import BLUE, GREY, STYLE, WIDTH
from peft_moe_merge.selection import DiscriminantSelector, RidgeSelector, Selector

MEASURES = {  # measure -> what its row says, and the unit's size
    "adapter": ("adapter, MB", 1e6),
    "resident": ("held by the process, MB", 1e6),
    "written": ("written by a checkpoint, MB", 1e6),
    "stored": ("checkpoint on the disk, MB", 1e6),
    "add_seconds": ("adding a task, ms", 1e-3),
    "step_seconds": ("a step, ms", 1e-3),
    "save_seconds": ("writing a checkpoint, ms", 1e-3),
}
SHOWN = (25, 50, 100, 200)
CHOICES = (25, 50, 100, 200, 1000)
SETTLED = 10  # tasks before which nothing is fitted
FAR = 1000
IMAGES = 32
CHOSEN = 16  # images whose tasks are chosen at once
AIM = 0.05


# ---------------------------------------------------------------------------------------------------------- learning


def tiny_task(position: int) -> Task:
    """Make a task of a few images; those of the same mini task have other images, and share their classes."""
    name = list(TASKS)[position % len(TASKS)]
    rows = load_task(name, "train").shuffle(seed=position).select(range(IMAGES))
    return Task(f"task {position + 1}", TASKS[name].classes, TASKS[name].templates, rows, rows)


def bytes_of(folder: Path, but: set[int] = frozenset()) -> int:
    """Add up the files of a folder, without those of some inodes."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum(file.st_size for file in files if file.st_ino not in but)


def learn(folder: Path, tasks: int, steps: int, batch_size: int) -> list[dict[str, float]]:
    """Learn tasks, and measure after each; go on where an earlier run stopped.

    Args:
        folder: of the checkpoints and of `learnt.json`, the measures.
        tasks: how many in the end.
        steps: of a task.
        batch_size: images a step.
    """
    method = METHODS["moe_lora_pool"](*load_clip(mini_clip_path()), MethodSettings())
    progress = Progress(settings={"steps": steps, "batch_size": batch_size})
    done, file = checkpoint.load(folder, progress.settings), folder / "learnt.json"
    if done is not None:
        progress, weights = done
        method.load(weights)
    measured = json.loads(file.read_text()) if file.exists() else []
    lost = [dict.fromkeys(MEASURES, float("nan"))] * max(0, len(progress.matrix) - len(measured))  # stopped right here
    measured = measured[: len(progress.matrix)] + lost
    for position in tqdm(range(len(progress.matrix), tasks), desc="tasks"):
        now = learn_one(method, position, steps, batch_size)
        before = {path.stat().st_ino for path in folder.rglob("*")}
        progress.matrix.append([])
        progress.processes.append(1)
        began = time.perf_counter()
        checkpoint.save(folder, progress, method.save_so_far)
        now["save_seconds"] = time.perf_counter() - began
        newest = checkpoint.newest(folder)
        now["written"], now["stored"] = bytes_of(newest, but=before), bytes_of(newest)
        own = [parameter for name, parameter in method.model.named_parameters() if "moe_lora" in name]
        now["adapter"] = sum(parameter.numel() * parameter.element_size() for parameter in own)
        now["resident"] = process_bytes("VmRSS")
        measured.append(now)
        write_json(file, measured)
    return measured


def learn_one(method: Any, position: int, steps: int, batch_size: int) -> dict[str, float]:
    """Let the method learn a task; return the seconds to add it and of a step, the first of which is left out."""
    task = tiny_task(position)
    set_seed(position)
    began = time.process_time()
    method.begin_task(task)
    added = time.process_time() - began
    method.model.train()
    optimizer = torch.optim.AdamW(method.parameter_groups(method.learning_rate(1e-3)))
    images = method.processor.image_processor
    seconds = []
    for batch in train_batches(
        task.train, images, steps=steps, batch_size=batch_size, seed=position, crop_scale=0.9, num_workers=0
    ):
        began = time.process_time()
        method.loss(method.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(optimizer)
        seconds.append(time.process_time() - began)
    method.end_task()
    return {"add_seconds": added, "step_seconds": statistics.median(seconds[1:] or seconds)}


# ------------------------------------------------------------------------------------------------------------ curves


def trend(values: Sequence[float]) -> dict[str, float]:
    """Fit a line to a curve over numbers of tasks, from 1 on, and a parabola to see whether it bends.

    Returns:
        `slope` a task, the line at `FAR` tasks, `residual`, the standard deviation about the line; `bend`, what a parabola adds
        at the last task as a share of the value there, and twice its standard error, `bend_error`.
    """
    tasks_T = np.arange(1, len(values) + 1, dtype=float)
    y_T = np.asarray(values, dtype=float)
    kept_T = np.isfinite(y_T) & (tasks_T > min(SETTLED, len(values) // 2))
    x_T, y_T = tasks_T[kept_T], y_T[kept_T]
    line = np.polynomial.Polynomial.fit(x_T, y_T, 1)
    # orthogonal to the line, so that its coefficient and error are those of the parabola
    raw_T = (x_T - x_T.mean()) ** 2
    curve_T = raw_T - np.polynomial.Polynomial.fit(x_T, raw_T, 1)(x_T)
    residual_T = y_T - line(x_T)
    coefficient = (residual_T @ curve_T) / (curve_T @ curve_T)
    left_T = residual_T - coefficient * curve_T
    error = np.sqrt(left_T @ left_T / max(1, len(x_T) - 3) / (curve_T @ curve_T))
    scale = abs(curve_T[-1] / y_T[-1]) if y_T[-1] else 0.0
    return {
        "slope": float(line.convert().coef[1] if len(line.convert().coef) > 1 else 0.0),
        "far": float(line(FAR)),
        "residual": float(residual_T.std(ddof=min(2, len(x_T) - 1))),
        "bend": float(coefficient * scale),
        "bend_error": float(2 * error * scale),
    }


def growth_of(found: dict[str, float], last: float) -> str:
    """Say in a word how a curve goes on: faster than linearly only where the bend is beyond its error and above 5 %."""
    if found["bend"] > max(found["bend_error"], 0.05):
        return "bends up"
    risen = found["slope"] * FAR
    return "grows" if risen > max(0.1 * abs(last), 2 * found["residual"]) else "flat"


# ---------------------------------------------------------------------------------------------------------- choosing


def clips() -> dict[str, tuple[Callable[[], Any], int]]:
    """Make a pass of each image tower over random images, and name the width of its features."""
    torch.manual_seed(0)
    mini, _ = load_clip(mini_clip_path())
    large = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16))  # CLIP's other defaults are a ViT-B's
    small_pixels, pixels = torch.randn(CHOSEN, 3, 32, 32), torch.randn(CHOSEN, 3, 224, 224)
    mini.eval(), large.eval()
    return {
        "mini": (lambda: mini.get_image_features(small_pixels), mini.config.projection_dim),
        "ViT-B/16": (lambda: large(pixels), large.config.projection_dim),
    }


def fitted(make: Callable[[], Selector], tasks: int, width: int) -> Selector:
    """Fit a selector to so many tasks of random features, 60 images each."""
    generator, selector = torch.Generator().manual_seed(0), make()
    for task in range(tasks):
        centre_F = torch.randn(width, generator=generator)
        features_BF = centre_F + torch.randn(60, width, generator=generator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that thresholds rest on few images
            selector.fit(f"task {task}", features_BF)
    return selector


SELECTORS: dict[str, Callable[[], Selector]] = {
    "discriminant, one covariance": partial(DiscriminantSelector, shared=(1.0,), shrinkage=(0.1,)),
    "ridge": partial(RidgeSelector, ridges=(0.1,)),
}


@torch.no_grad()
def choose(numbers: Sequence[int], rounds: int, which: Sequence[str]) -> list[dict[str, Any]]:
    """Measure what choosing among numbers of tasks costs beside a pass of the image tower, in rounds of all."""
    rows = []
    for clip, (run, width) in clips().items():
        if clip not in which:
            continue
        for kind, make in SELECTORS.items():
            selectors, prepared = {}, {}
            for tasks in numbers:
                selectors[tasks] = fitted(make, tasks, width)
                began = time.process_time()
                selectors[tasks].select(torch.randn(1, width))  # the first choice prepares what all need
                prepared[tasks] = time.process_time() - began
            features_BF = torch.randn(CHOSEN, width)
            turns = {"pass": timed(run, "cpu")}
            for tasks, selector in selectors.items():
                turns[str(tasks)] = timed(partial(selector.select, features_BF), "cpu", 5)
            seconds = {name: phases["step"] for name, phases in take_turns(turns, rounds, f"{clip}, {kind}").items()}
            for tasks, selector in selectors.items():
                share, within = quartiles(ratios(seconds[str(tasks)], seconds["pass"]))
                rows.append(
                    {
                        "clip": clip,
                        "selector": kind,
                        "tasks": tasks,
                        "seconds": statistics.median(seconds[str(tasks)]),
                        "share": share,
                        "quartiles": within,
                        "prepare_seconds": prepared[tasks],
                        "bytes_per_task": selector.bytes_per_task,
                    }
                )
    return rows


# ----------------------------------------------------------------------------------------------------------- showing


def show(measured: list[dict[str, float]], chosen: list[dict[str, Any]], figure: Path) -> None:
    """Print the tables and draw the figure."""
    console, columns = Console(), [tasks for tasks in SHOWN if tasks <= len(measured)] or [len(measured)]
    table = Table("after tasks", *map(str, columns), f"line at {FAR}", "residual", "bend, %", "")
    drawn = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = drawn.subplots(2, 4).flat
    for panel, (name, (label, unit)) in zip(axes, MEASURES.items(), strict=False):
        values = [row[name] for row in measured]
        found = trend(values)
        table.add_row(
            label,
            *(f"{values[tasks - 1] / unit:.3g}" for tasks in columns),
            f"{found['far'] / unit:.4g}",
            f"{found['residual'] / unit:.2g}",
            f"{100 * found['bend']:.1f} ± {100 * found['bend_error']:.1f}",
            growth_of(found, values[-1]),
        )
        tasks_T = np.arange(1, len(values) + 1)
        panel.plot(tasks_T, np.array(values) / unit, ".", color=BLUE, markersize=3)
        panel.plot(
            [1, len(values)], [(found["far"] + found["slope"] * (at - FAR)) / unit for at in (1, len(values))], GREY
        )
        panel.set(xlabel="tasks learnt", ylabel=label, ylim=(0, None))
    console.print(table)
    choices = Table("choosing among", "tasks", "of a pass, %", "quartiles", "ms", "prepared once, s", "bytes a task")
    last = axes[len(MEASURES)]
    for row in chosen:
        low, high = row["quartiles"]
        choices.add_row(
            f"{row['clip']}, {row['selector']}",
            str(row["tasks"]),
            f"{100 * row['share']:.2f}",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{1e3 * row['seconds']:.2f}",
            f"{row['prepare_seconds']:.2f}",
            str(row["bytes_per_task"]),
        )
    for clip, kind in dict.fromkeys((row["clip"], row["selector"]) for row in chosen):
        of = [row for row in chosen if (row["clip"], row["selector"]) == (clip, kind)]
        last.plot([row["tasks"] for row in of], [100 * row["share"] for row in of], "o-", label=f"{clip}, {kind}")
    last.axhline(100 * AIM, color=GREY, linewidth=0.8)
    last.set(xlabel="tasks to choose from", ylabel="choosing (% of a pass)", ylim=(0, None))
    last.legend(fontsize=6)
    if chosen:
        console.print(choices)
    with matplotlib.rc_context(STYLE), whole(figure) as unfinished:
        drawn.savefig(unfinished, format="png", dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints, numbers and the figure")
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--steps", type=int, default=4, help="of a task")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="of choosing")
    parser.add_argument("--only_show", action="store_true", help="measure nothing")
    parser.add_argument("--quick", action="store_true", help="4 tasks; choosing among 5, by the mini CLIP")
    args = parser.parse_args()
    numbers, which = CHOICES, ("mini", "ViT-B/16")
    if args.quick:
        args.tasks, args.steps, args.rounds, numbers, which = 4, 2, 1, (2, 5), ("mini",)
    if args.tasks < 4 or args.steps < 1:
        parser.error(f"--tasks is to be at least 4 and --steps 1, got {args.tasks} and {args.steps}")
    torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    learnt, chosen = args.output / "checkpoints" / "learnt.json", args.output / "chosen.json"
    if not args.only_show:
        learn(args.output / "checkpoints", args.tasks, args.steps, args.batch_size)
        if not chosen.exists():
            write_json(chosen, choose(numbers, args.rounds, which))
    for file in (learnt, chosen):
        if not file.exists():
            parser.error(f"there is no {str(file)!r} yet: run without --only_show first")
    show(json.loads(learnt.read_text()), json.loads(chosen.read_text()), args.output / "thousand_tasks.png")


if __name__ == "__main__":
    main()
