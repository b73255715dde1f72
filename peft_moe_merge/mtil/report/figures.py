"""How well a stream was learnt, and what it cost, in pictures.

Shapes: T tasks, S seeds, L stages of a stream, J data sets, N choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peft_moe_merge.report.plots import BLUE, SKY, WIDTH, heat_map, line, look
from peft_moe_merge.report.statistics import over_seeds

from ..results import METRICS
from .axes import mark_tasks, starts

Runs = list[dict[str, Any]]
GROWING = {  # measure -> what its axis says, and the unit's size
    "memory": ("memory (MB)", 1e6),
    "parameters": ("parameters (millions)", 1e6),
    "step_seconds": ("time of a step (ms)", 1e-3),
    "resident": ("held by the process (MB)", 1e6),
    "step_ratio": ("time of a step (x one task)", 1),
    "add_seconds": ("time to add a task (ms)", 1e-3),
}


def metric_figure(methods: dict[str, Runs]) -> Figure:
    """Draw Transfer, Average and Last of every method as bars, with their intervals."""
    figure = Figure(figsize=(WIDTH, 1.2 + 0.32 * len(methods)), layout="constrained")
    rows = range(len(methods))
    for axes, metric in zip(figure.subplots(1, 3, sharey=True), METRICS, strict=False):
        estimates = [over_seeds(runs, metric) for runs in methods.values()]
        axes.barh(rows, [e.mean or 0 for e in estimates], color=BLUE, height=0.7)
        for row, estimate in zip(rows, estimates, strict=True):
            if estimate.half is not None:
                axes.plot([estimate.low, estimate.high], [row, row], color="black", linewidth=1.5, marker="|")
            text = "-" if estimate.mean is None else f"{estimate.mean:.1f}"
            axes.text(min(max(estimate.mean or 0, estimate.high or 0), 100) + 2, row, text, va="center")
        axes.set(title=metric.capitalize(), xlabel="%", xlim=(0, 116), xticks=range(0, 101, 25))
        axes.set_yticks(rows, methods)
    axes.invert_yaxis()
    return figure


def accuracy_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw the accuracy matrix, the mean over seeds."""
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.4 * len(tasks)), layout="constrained")
    axes = figure.subplots()
    heat_map(axes, np.mean([run["matrix"] for run in runs], axis=0), tasks, tasks, "accuracy (%)", high=100)
    axes.set(xlabel="tested on", ylabel="after training")
    return figure


def plasticity(
    matrices: Mapping[str, Sequence[Sequence[Sequence[float]]]], tasks: Sequence[str] = (), relative: bool = False
) -> Figure:
    """Draw how well each task of a stream is learnt, right after its training.

    Args:
        matrices: per method, one accuracy matrix a seed: `a[i][j]` in percent on task j after training task i.
        tasks: names of the tasks, in order.
        relative: draw what a task gained, `a[i][i] - a[0][i]`. Before any task but the first was trained is not in the matrix,
            so that the first task has no value, and a method that changes other tasks is not compared with the untouched model.
    """
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots()
    for position, (name, of_seeds) in enumerate(matrices.items()):
        a_STT = np.asarray(of_seeds, dtype=np.float64)
        learnt_ST = a_STT.diagonal(axis1=1, axis2=2)
        if relative:
            learnt_ST = np.where(np.arange(a_STT.shape[1]) > 0, learnt_ST - a_STT[:, 0], np.nan)
        line(axes, range(1, a_STT.shape[1] + 1), learnt_ST, name, markersize=4, **look(position))
    axes.set(xlabel="position in the stream", ylabel="gained when learnt (points)" if relative else "just learnt (%)")
    if relative:
        axes.axhline(0, color="#888888", linewidth=0.8, zorder=0)
    if tasks:
        axes.set_xticks(range(1, len(tasks) + 1), tasks, rotation=40, ha="right")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(matrices) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def growth(measured: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Figure:
    """Draw what each further task costs.

    Args:
        measured: per method, any of `memory` (bytes), `parameters` (number), `step_seconds`, `resident` (bytes), `step_ratio`
            and `add_seconds`, each S x T: one row a seed, one column a number of tasks, from 1 on. What no method has gets no
            panel.

    Raises:
        ValueError: there is nothing to draw.
    """
    shown = [measure for measure in GROWING if any(measure in of_method for of_method in measured.values())]
    if not shown:
        raise ValueError(f"Nothing to draw: give {', '.join(GROWING)} of a method; got {dict(measured)}.")
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, measure in zip(grid, shown, strict=True):
        label, unit = GROWING[measure]
        for position, (name, of_method) in enumerate(measured.items()):
            if measure in of_method:
                values_ST = np.asarray(of_method[measure], dtype=np.float64) / unit
                line(axes, range(1, values_ST.shape[1] + 1), values_ST, name, markersize=4, **look(position))
        axes.set(xlabel="tasks learnt", ylabel=label)
        axes.set_ylim(0, 1.06 * max(np.nanmax(line.get_ydata()) for line in axes.get_lines()))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(measured) > 1:
        named = {}
        for axes in grid:
            named |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named, loc="outside upper center", ncols=4)
    return figure


def confusion_figure(tasks: list[str], runs: Runs, selector: str) -> Figure:
    """Draw which tasks a selector chose for the images of each data set, half-way through the stream and at its end."""
    counts_LJN = np.mean([run["selection"][selector]["per_image"]["confusion"] for run in runs], axis=0)
    share_LJN = 100 * counts_LJN / counts_LJN.sum(axis=2, keepdims=True)
    stages = sorted({max(0, len(tasks) // 2 - 1), len(tasks) - 1})
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.4 * len(tasks) * len(stages)), layout="constrained")
    for axes, stage in zip(figure.subplots(len(stages), 1, squeeze=False).flat, stages, strict=True):
        heat_map(axes, share_LJN[stage], [*tasks, "none"], tasks, "chosen (%)", high=100)
        axes.set(title=f"after {tasks[stage]}, task {stage + 1} of {len(tasks)}", ylabel="images from")
    axes.set(xlabel="task chosen")
    return figure


def loss_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw the loss of every step, task after task: the mean over seeds of the steps that all of them have."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    per_task = list(zip(*(run["losses"] for run in runs), strict=False))
    lengths = [min(map(len, losses)) for losses in per_task]
    for losses, first, length in zip(per_task, starts(lengths), lengths, strict=True):
        if not length:
            continue
        mean = np.mean(np.array([of_seed[:length] for of_seed in losses], dtype=float), axis=0)
        steps = first + np.arange(length)
        window = max(1, length // 20)
        axes.plot(steps, mean, color=SKY, linewidth=0.6, alpha=0.7)
        axes.plot(steps[window - 1 :], np.convolve(mean, np.ones(window) / window, "valid"), color=BLUE)
    mark_tasks(axes, tasks, lengths)
    axes.set(xlabel="optimizer step", ylabel="training loss")
    return figure
