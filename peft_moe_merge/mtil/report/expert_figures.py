"""What happens inside a mixture of experts while it learns a stream, in pictures.

Shapes: T tasks, S seeds, E experts, N blocks; in `activation_map` P points and F features.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE

from peft_moe_merge.report.plots import BLUE, RED, WIDTH, heat_map, look, panels

from .axes import mark_tasks, short_names, starts

Runs = list[dict[str, Any]]
Snapshots = Sequence[tuple[int, Mapping[str, Sequence[int]]]]
FEWEST_POINTS = 8
PERPLEXITY = 30.0


def frozen_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw how many experts of each block are frozen after each task."""
    blocks = ordered_blocks([frozen for run in runs for frozen in run["frozen"]])
    counts_SNT = [[[len(frozen.get(block, ())) for frozen in run["frozen"]] for block in blocks] for run in runs]
    figure = Figure(figsize=(3 + 0.6 * len(tasks), 1.8 + 0.3 * len(blocks)), layout="constrained")
    axes = figure.subplots()
    digits = 0 if len(runs) == 1 else 1
    labels = [block_label(block) for block in blocks]
    heat_map(axes, np.mean(counts_SNT, axis=0), tasks, labels, "frozen experts", digits=digits)
    axes.set(xlabel="after training", ylabel="block")
    return figure


def usage_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw, for each block, a histogram per task of the experts its router selected, of the first run."""
    usage = runs[0]["usage"]
    figure = None
    for axes, block in panels(ordered_blocks(usage), 0.5 + 0.14 * len(tasks)):
        known = [counts[block] for counts in usage if block in counts]
        counts_TE = np.zeros((len(known), max(map(len, known), default=0)))
        for row_E, counts_E in zip(counts_TE, known, strict=True):  # a pool grows: the first tasks knew fewer experts
            row_E[: len(counts_E)] = counts_E
        share_TE = 100 * counts_TE / np.maximum(counts_TE.sum(axis=1, keepdims=True), 1)
        edges = np.arange(share_TE.shape[1] + 1) - 0.5, np.arange(len(share_TE) + 1)
        image = axes.pcolormesh(*edges, share_TE, cmap="Blues", vmin=0, vmax=50, edgecolor="white", linewidth=0.3)
        named = [task for task, counts in zip(tasks, usage, strict=False) if block in counts]
        axes.set_yticks(np.arange(len(share_TE)) + 0.5, named, fontsize=7)
        axes.set_ylim(len(share_TE), 0)
        axes.set(title=block_label(block), xlabel="expert")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.label_outer()
        figure = axes.figure
    figure.colorbar(image, ax=figure.axes, label="selected (%)", extend="max", aspect=40)
    return figure


def merge_figure(tasks: list[str], runs: Runs) -> Figure:
    """Draw, for each block, which experts merged into which over the optimizer steps of the first run's stream."""
    merges, losses = runs[0]["merges"], runs[0].get("losses")
    # a run without losses does not say how long its tasks were: up to their last merges, at least
    steps = (
        [max((step for step, _ in of_task), default=0) for of_task in merges] if not losses else list(map(len, losses))
    )
    events = [
        (first + step, merged)
        for first, of_task in zip(starts(steps), merges, strict=False)
        for step, merged in of_task
    ]
    figure = None
    for axes, block in panels(ordered_blocks([merged for _, merged in events]), 1.9):
        for step, merged in events:
            if block in merged:
                target, *sources = merged[block]
                axes.plot([step] * (1 + len(sources)), [target, *sources], color="#bbbbbb", linewidth=0.6, zorder=1)
                axes.scatter([step] * len(sources), sources, s=12, facecolors="white", edgecolors=BLUE, linewidths=0.8)
                axes.scatter([step], [target], s=10, color=RED, zorder=3)
        mark_tasks(axes, short_names(tasks), steps)
        axes.set(xlabel="optimizer step", ylabel="expert")
        axes.set_title(block_label(block), pad=14)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.label_outer()
        figure = axes.figure
    return figure


def selection_over_training(snapshots: Mapping[str, Snapshots]) -> Figure:
    """Draw, for each block, how much each expert is selected as training goes on, task after task.

    Args:
        snapshots: per task, in order, a list of (step of the task, selections of each expert so far in this task: per block
            a list of E counts). Each column of the picture is what was selected since the snapshot before.

    Raises:
        ValueError: there is no snapshot, or the steps of a task do not rise from above 0.
    """
    lengths, edges, selected = [], [0], []
    for task, of_task in snapshots.items():
        steps = [step for step, _ in of_task]
        if sorted({0, *steps}) != [0, *steps]:
            raise ValueError(f"The snapshots of task {task!r} are to rise from above step 0; their steps are {steps}.")
        before: Mapping[str, Sequence[int]] = {}
        for step, counts in of_task:
            since = {block: np.subtract(now, before.get(block, 0)) for block, now in counts.items()}
            edges.append(sum(lengths) + step)
            selected.append(since)
            before = counts
        lengths.append(steps[-1] if steps else 0)
    if not selected:
        raise ValueError("There is no snapshot to draw.")
    figure = None
    for axes, block in panels(ordered_blocks(selected), 1.9):
        experts = max(len(since[block]) for since in selected if block in since)
        share_ET = np.full((experts, len(selected)), np.nan)
        for column, since in enumerate(selected):
            if block in since:
                # a pool grows: at first there were fewer experts
                share_ET[: len(since[block]), column] = 100 * since[block] / max(1, since[block].sum())
        image = axes.pcolormesh(edges, np.arange(experts + 1) - 0.5, share_ET, cmap="viridis", vmin=0, vmax=50)
        mark_tasks(axes, short_names(list(snapshots)), lengths)
        axes.set_xlim(0, sum(lengths))
        axes.set(xlabel="optimizer step", ylabel="expert")
        axes.set_title(block_label(block), pad=14)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.label_outer()
        figure = axes.figure
    figure.colorbar(image, ax=figure.axes, label="selected (%)", extend="max", aspect=40)
    return figure


def activation_map(stages: Mapping[str, tuple[Any, Any]], seed: int = 0) -> Figure:
    """Draw where experts' activations lie, before and after a merge say, in one t-SNE of two dimensions (scikit-learn's).

    All stages are embedded together, so that their panels can be compared; distances between far groups mean little, as
    always with t-SNE.

    Args:
        stages: per panel, such as "before merging", activations `[P, F]` and the index of the expert each is of, `[P]`.
        seed: of the embedding; the same activations and seed give the same picture.

    Raises:
        ValueError: there are not as many experts' indices as activations, or too few activations to embed.
    """
    activations, experts = [], []
    for stage, (values, indices) in stages.items():
        activations.append(np.asarray(values, dtype=np.float64))
        experts.append(np.asarray(indices))
        if activations[-1].ndim != 2 or experts[-1].shape != activations[-1].shape[:1]:
            raise ValueError(
                f"Stage {stage!r} needs activations [P, F] and an expert each, [P]; got the shapes "
                f"{activations[-1].shape} and {experts[-1].shape}."
            )
    points = sum(map(len, activations))
    if points < FEWEST_POINTS:
        raise ValueError(f"t-SNE needs at least {FEWEST_POINTS} activations; got {points}.")
    embedding = TSNE(perplexity=min(PERPLEXITY, (points - 1) / 3), init="pca", random_state=seed, n_jobs=1)
    embedded_P2 = embedding.fit_transform(np.concatenate(activations))
    per_stage = np.split(embedded_P2, np.cumsum([len(values) for values in activations])[:-1])
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    grid = figure.subplots(1, len(stages), sharex=True, sharey=True, squeeze=False)[0]
    everyone, named = sorted({int(expert) for indices in experts for expert in indices}), {}
    for axes, stage, at_P2, indices in zip(grid, stages, per_stage, experts, strict=True):
        for position, expert in enumerate(everyone):
            chosen_P2 = at_P2[indices == expert]
            if len(chosen_P2):
                drawn = axes.scatter(*chosen_P2.T, s=14, alpha=0.8, linewidths=0, label=f"{expert}", **look(position))
                named.setdefault(expert, drawn)
        axes.set(title=stage, xlabel="t-SNE 1", ylabel="t-SNE 2", xticks=[], yticks=[])
        axes.label_outer()
    if len(named) > 1:
        handles = [named[expert] for expert in everyone]
        figure.legend(handles, everyone, title="expert", loc="outside right upper", ncols=-(-len(everyone) // 16))
    return figure


def block_label(block: str) -> str:
    """Shorten a module's name: `"vision_model.encoder.layers.3.mlp"` is `"vision 3"`, its `fc2` `"vision 3 fc2"`."""
    match = re.search(r"(vision|text)_model\..*?(\d+)(?:.*\.(\w+))?$", block)
    return " ".join(part for part in match.groups() if part not in (None, "mlp")) if match else block


def ordered_blocks(per_task: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the blocks in the order of the network: by tower, then by number."""
    names = {block for of_task in per_task for block in of_task}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
