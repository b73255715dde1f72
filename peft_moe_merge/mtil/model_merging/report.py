"""Tables and a picture of the comparison. Reads results only, never a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table


def average(row: dict[str, float]) -> float:
    """Return the mean over tasks, `nan` without any."""
    return sum(row.values()) / len(row) if row else float("nan")


def over_seeds(runs: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> str:
    """Return "mean ± standard deviation" over the seeds, or "-" where there is no number."""
    values = [value(run) for run in runs]
    if any(number != number for number in values):
        return "-"
    spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def print_report(results: dict[str, Any], console: Console | None = None) -> None:
    """Print accuracy per task for each method, then held-out tasks, then corrupted images."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file has no edge
    runs = results["runs"]
    tasks, held_out = runs[0]["tasks"], runs[0]["held_out"]
    adapted = (
        "the test images themselves (transductive)" if runs[0]["settings"]["transductive"] else "a disjoint split"
    )
    methods = list(runs[0]["rows"])

    table = Table(
        title=f"{results['suite']}: accuracy in %, {len(runs)} seed(s)",
        caption=f"Adapting methods saw unlabelled images of {adapted}. Seconds: to merge and adapt, or to train jointly; "
        "the time to fine-tune the copies is not in them.",
    )
    table.add_column("method")
    for column in (*tasks, "average", "trainable", "stored M", "seconds"):
        table.add_column(column, justify="right")
    for method in methods:
        own = [run["rows"][method] for run in runs]
        table.add_row(
            method,
            *[over_seeds(own, lambda row, task=task: row["accuracy"][task]) for task in tasks],
            over_seeds(own, lambda row: average(row["accuracy"])),
            f"{own[0]['trainable_parameters']:,}",
            f"{own[0]['stored_numbers'] / 1e6:.2f}",
            f"{statistics.mean(row['seconds'] for row in own):.0f}",
        )
    console.print(table)

    if held_out:
        table = Table(title="tasks that no model was fine-tuned on")
        table.add_column("method")
        for column in (*held_out, "average"):
            table.add_column(column, justify="right")
        for method in methods:
            own = [run["rows"][method]["held_out"] for run in runs]
            if own[0]:
                cells = [over_seeds(own, lambda row, task=task: row[task]) for task in held_out]
                table.add_row(method, *cells, over_seeds(own, average))
        console.print(table)

    if runs[0]["robustness"]:
        table = Table(
            title="corrupted images: average over tasks, and below it the worst task",
            caption="adapted on images corrupted alike",
        )
        table.add_column("method")
        corruptions = list(runs[0]["robustness"])
        for corruption in corruptions:
            table.add_column(corruption, justify="right")
        for method in runs[0]["robustness"][corruptions[0]]:
            own = [[run["robustness"][corruption][method] for run in runs] for corruption in corruptions]
            table.add_row(method, *[over_seeds(rows, average) for rows in own])
            table.add_row("", *[over_seeds(rows, lambda row: min(row.values())) for rows in own])
        console.print(table)


def save_picture(results: dict[str, Any], path: Path) -> Path:
    """Draw each method's average over tasks, with a mark for each seed, and save it as PNG."""
    runs = results["runs"]
    methods = list(runs[0]["rows"])
    figure, axes = plt.subplots(figsize=(7, 0.35 * len(methods) + 1.2), layout="constrained")
    for position, method in enumerate(reversed(methods)):
        values = [average(run["rows"][method]["accuracy"]) for run in runs]
        adapter = method.startswith(("wemoe", "e_wemoe", "smile"))
        axes.barh(position, statistics.mean(values), color="#4477aa" if adapter else "#bbbbbb")
        axes.plot(values, [position] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(methods)), list(reversed(methods)))
    axes.set_xlabel(f"accuracy in %, mean over {len(runs[0]['tasks'])} tasks; dots: seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
