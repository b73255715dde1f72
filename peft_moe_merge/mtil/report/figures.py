"""Results as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def save_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw each run's accuracy matrix and loss curves as one PNG.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, runs in results["methods"].items():
        for run in runs:
            figure = run_figure(results["tasks"], run, f"{name}, seed {run['seed']}")
            files.append(folder / f"{name}_seed_{run['seed']}.png")
            figure.savefig(files[-1], dpi=120)
            plt.close(figure)
    return files


def run_figure(tasks: list[str], run: dict[str, Any], title: str) -> plt.Figure:
    """Draw one run: the accuracy matrix, and beside it the loss of every task's training, where there was any."""
    losses = run.get("losses") or []
    figure, axes = plt.subplots(1, 2 if losses else 1, figsize=(12 if losses else 6, 5), squeeze=False)
    figure.suptitle(title)
    heat = axes[0][0]
    image = heat.imshow(run["matrix"], vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(run["matrix"]):
        for j, value in enumerate(row):
            heat.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black")
    heat.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    heat.set_yticks(range(len(run["matrix"])), tasks[: len(run["matrix"])])
    heat.set(xlabel="tested on", ylabel="after training")
    figure.colorbar(image, ax=heat, label="accuracy (%)", shrink=0.8)
    if losses:
        curves, first_step = axes[0][1], 0
        for task, values in zip(tasks, losses, strict=False):
            curves.plot(range(first_step, first_step + len(values)), values, label=task, linewidth=0.8)
            first_step += len(values)
        curves.set(xlabel="optimizer step", ylabel="training loss")
        curves.legend(fontsize="small")
    figure.tight_layout()
    return figure
