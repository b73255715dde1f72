"""Results as pictures, in colours that the colour-blind can tell apart.

Shapes: T tasks, S seeds, E experts, N blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..results import METRICS
from .statistics import mean_matrix, over_seeds

COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#000000",
)  # Okabe and Ito 2008
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "text.parse_math": False,  # a `$` in a task's name is a `$`
}
WIDTH = 10.0  # inches

Runs = list[dict[str, Any]]
Pictures = dict[str, tuple[Figure, str]]


def draw_all(results: dict[str, Any]) -> Pictures:
    """Draw what there is to see: per name a figure and its caption.

    What happened inside a method (losses, merges, frozen experts, usage) is drawn where its runs tell of it.
    """
    tasks, pictures = results["tasks"], {}
    inside: list[tuple[str, Callable[[list[str], Runs], Figure], str]] = [
        ("losses", loss_figure, "Training loss; pale: each step, strong: running mean"),
        ("frozen", frozen_figure, "Frozen experts per block after each task"),
        ("usage", usage_figure, "Selections of each expert by each task's routers in training, in percent"),
        ("merges", merge_figure, "Merge events: two experts (rings) and the one they overwrite (dot)"),
    ]
    with matplotlib.rc_context(STYLE):
        if results["methods"]:
            pictures["metrics"] = (
                metric_figure(results["methods"]),
                "Mean over seeds, with the 95 % bootstrap interval where there are several",
            )
        for name, runs in results["methods"].items():
            pictures[f"accuracy_{name}"] = (
                accuracy_figure(tasks, runs),
                f"{name}: accuracy in percent, {_seeds(runs)}; on and below the diagonal the task has been learnt",
            )
        for name, runs in results["methods"].items():
            for selector in runs[0].get("selection") or {}:
                pictures[f"selection_{name}_{selector}"] = (
                    confusion_figure(tasks, runs, selector),
                    f"{name}: tasks that {selector} chose, image by image, in percent of a data set's images, "
                    f"{_seeds(runs)}; half-way and at the end",
                )
        for what, draw, caption in inside:
            for name, runs in results["methods"].items():
                shown = runs[:1] if what in ("usage", "merges") else runs
                # a method that could have merged and did not tells of tasks without merges
                if any(of_task for run in shown for of_task in run.get(what) or ()):
                    pictures[f"{what}_{name}"] = (draw(tasks, shown), f"{name}: {caption}, {_seeds(shown)}")
    return pictures


def metric_figure(methods: dict[str, Runs]) -> Figure:
    """Draw Transfer, Average and Last of every method as bars, with their intervals."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(methods)), layout="constrained")
    rows = range(len(methods))
    for axes, metric in zip(figure.subplots(1, 3, sharey=True), METRICS, strict=False):
        estimates = [over_seeds(runs, metric) for runs in methods.values()]
        axes.barh(rows, [e.mean or 0 for e in estimates], color=COLOURS[0], height=0.7)
        for row, estimate in zip(rows, estimates, strict=True):
            if estimate.low is not None:
                axes.plot([estimate.low, estimate.high], [row, row], color="black", linewidth=1.5, marker="|")
            text = "-" if estimate.mean is None else f"{estimate.mean:.1f}"
            axes.text(max(estimate.mean or 0, estimate.high or 0) + 2, row, text, va="center")
        axes.set(title=metric.capitalize(), xlim=(0, 112), xticks=range(0, 101, 25))
        axes.set_yticks(rows, methods)
    axes.invert_yaxis()
    return figure


def accuracy_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw the accuracy matrix, the mean over seeds."""
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.4 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    _heat_map(axes, mean_matrix(runs), tasks, tasks, "accuracy (%)", high=100)
    axes.set(xlabel="tested on", ylabel="after training")
    return figure


def confusion_figure(tasks: list[str], runs: Runs, selector: str) -> Figure:
    """Draw which tasks a selector chose for the images of each data set, half-way through the stream and at its end."""
    counts_LJN = np.mean([run["selection"][selector]["per_image"]["confusion"] for run in runs], axis=0)
    share_LJN = 100 * counts_LJN / counts_LJN.sum(axis=2, keepdims=True)
    stages = sorted({max(0, len(tasks) // 2 - 1), len(tasks) - 1})
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.4 * len(tasks) * len(stages)), layout="constrained")
    for axes, stage in zip(figure.subplots(len(stages), 1, squeeze=False).flat, stages, strict=True):
        _heat_map(axes, share_LJN[stage], [*tasks, "none"], tasks, "chosen (%)", high=100)
        axes.set(title=f"after {tasks[stage]}, task {stage + 1} of {len(tasks)}", ylabel="images from")
    axes.set(xlabel="task chosen")
    return figure


def loss_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw the loss of every step, task after task."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    lengths = [len(losses) for losses in runs[0]["losses"]]
    for losses, first in zip(zip(*(run["losses"] for run in runs), strict=True), _starts(lengths), strict=True):
        mean = np.mean(np.array(losses, dtype=float), axis=0)
        steps = first + np.arange(len(mean))
        window = min(len(mean), max(1, len(mean) // 20))
        axes.plot(steps, mean, color=COLOURS[4], linewidth=0.6, alpha=0.7)
        axes.plot(steps[window - 1 :], np.convolve(mean, np.ones(window) / window, "valid"), color=COLOURS[0])
    _mark_tasks(axes, tasks, lengths)
    axes.set(xlabel="optimizer step", ylabel="training loss")
    return figure


def frozen_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw how many experts of each block are frozen after each task."""
    blocks = _blocks(runs[0]["frozen"])
    counts_SNT = [[[len(frozen[block]) for frozen in run["frozen"]] for block in blocks] for run in runs]
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.3 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    digits = 0 if len(runs) == 1 else 1
    labels = [block_label(block) for block in blocks]
    _heat_map(axes, np.mean(counts_SNT, axis=0), tasks, labels, "frozen experts", digits=digits)
    axes.set(xlabel="after training", ylabel="block")
    return figure


def usage_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw, for each block, a histogram per task of the experts its router selected."""
    usage = runs[0]["usage"]
    figure = None
    for axes, block in _panels(_blocks(usage), 0.5 + 0.14 * len(tasks)):
        counts_TE = np.array([counts[block] for counts in usage], dtype=float)
        share_TE = 100 * counts_TE / np.maximum(counts_TE.sum(axis=1, keepdims=True), 1)
        image = axes.pcolormesh(share_TE, cmap="Blues", vmin=0, vmax=50, edgecolor="white", linewidth=0.3)
        axes.set_yticks(np.arange(len(share_TE)) + 0.5, tasks[: len(share_TE)], fontsize=7)
        axes.set_ylim(len(share_TE), 0)
        axes.set(title=block_label(block), xlabel="expert")
        axes.label_outer()
        figure = axes.figure
    figure.colorbar(image, ax=figure.axes, label="selected (%)", extend="max", aspect=40)
    return figure


def merge_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw, for each block, which experts merged into which over the optimizer steps of the stream."""
    merges = runs[0]["merges"]
    steps = [len(losses) for losses in runs[0]["losses"]]
    events = [
        (first + step, merged)
        for first, of_task in zip(_starts(steps), merges, strict=True)
        for step, merged in of_task
    ]
    figure = None
    for axes, block in _panels(_blocks([merged for _, merged in events]), 1.9):
        for step, merged in events:
            if block in merged:
                target, *sources = merged[block]
                axes.plot([step] * 3, [target, *sources], color="#bbbbbb", linewidth=0.6, zorder=1)
                axes.scatter([step] * 2, sources, s=12, facecolors="white", edgecolors=COLOURS[0], linewidths=0.8)
                axes.scatter([step], [target], s=10, color=COLOURS[5], zorder=3)
        _mark_tasks(axes, tasks if len(tasks) <= 4 else list(map(str, range(1, len(tasks) + 1))), steps)
        axes.set(xlabel="optimizer step", ylabel="expert")
        axes.set_title(block_label(block), pad=14)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.label_outer()
        figure = axes.figure
    return figure


def block_label(block: str) -> str:
    """Shorten a module's name: `"vision_model.encoder.layers.3.mlp"` is `"vision 3"`."""
    match = re.search(r"(vision|text)_model\..*?(\d+)", block)
    return f"{match[1]} {match[2]}" if match else block


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    columns: list[str],
    rows: list[str],
    label: str,
    high: float | None = None,
    digits: int = 0,
) -> None:
    high = high or max(1.0, values.max())
    image = axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=high, edgecolor="white", linewidth=0.5)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * high else "black"
        axes.text(column + 0.5, row + 0.5, f"{value:.{digits}f}", ha="center", va="center", color=colour)
    axes.set_xticks(np.arange(values.shape[1]) + 0.5, columns[: values.shape[1]], rotation=40, ha="right")
    axes.set_yticks(np.arange(values.shape[0]) + 0.5, rows[: values.shape[0]])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes, label=label)


def _panels(blocks: list[str], height: float) -> Iterator[tuple[Axes, str]]:
    columns = 2
    rows = -(-len(blocks) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[len(blocks) :]:
        axes.remove()
    return zip(grid, blocks, strict=False)


def _mark_tasks(axes: Axes, tasks: list[str], lengths: list[int]) -> None:
    """Separate the tasks on an axis of steps, and name them above it."""
    for task, first, length in zip(tasks, _starts(lengths), lengths, strict=False):
        axes.axvline(first, color="#cccccc", linewidth=0.6, zorder=0)
        middle = (first + length / 2, 1.01)
        axes.annotate(task, middle, xycoords=("data", "axes fraction"), ha="center", fontsize=7, color="#555555")
    axes.set_xlim(0, 1.01 * sum(lengths))


def _starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:position]) for position in range(len(lengths))]


def _blocks(per_task: list[dict[str, Any]]) -> list[str]:
    """Name the blocks in the order of the network: by tower, then by number."""
    names = {block for of_task in per_task for block in of_task}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _seeds(runs: Runs) -> str:
    numbers = ", ".join(str(run["seed"]) for run in runs)
    return f"mean of seeds {numbers}" if len(runs) > 1 else f"seed {numbers}"
