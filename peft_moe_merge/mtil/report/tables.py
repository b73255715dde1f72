"""Results in the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def matrix_table(tasks: list[str], run: dict[str, Any], title: str) -> Table:
    """Lay out one run's accuracy matrix, with Transfer, Average and Last of every task below it.

    Args:
        tasks: names, in order.
        run: an entry of `results["methods"][name]`.
        title: of the table.
    """
    table = Table(title=title, caption="accuracy in %; rows: after training the task, columns: tested on")
    table.add_column("after")
    for task in tasks:
        table.add_column(task, justify="right")
    table.add_column("mean", justify="right")
    for position, (task, row) in enumerate(zip(tasks, run["matrix"], strict=False)):
        cells = [f"[bold]{value:.1f}[/]" if column == position else f"{value:.1f}" for column, value in enumerate(row)]
        table.add_row(task, *cells, f"{sum(row) / len(row):.1f}")
    if len(run["matrix"]) == len(tasks):
        table.add_section()
        for name in ("transfer", "average", "last"):
            cells = ["-" if value != value else f"{value:.1f}" for value in run[f"{name}_per_task"]]
            table.add_row(name.capitalize(), *cells, "-" if run[name] != run[name] else f"{run[name]:.1f}")
    return table


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print every run's matrix, then one line per run to compare them."""
    console = console or Console()
    for name, runs in results["methods"].items():
        for run in runs:
            console.print(matrix_table(results["tasks"], run, f"{name}, seed {run['seed']}"))
    summary = Table(title=f"suite {results['suite']}")
    for column in ("method", "seed", "Transfer", "Average", "Last", "forgetting", "seconds", "trainable", "stored MB"):
        summary.add_column(column, justify="left" if column == "method" else "right")
    for name, runs in results["methods"].items():
        for run in runs:
            metrics = [
                "-" if run[key] != run[key] else f"{run[key]:.2f}"
                for key in ("transfer", "average", "last", "forgetting")
            ]
            summary.add_row(
                name,
                str(run["seed"]),
                *metrics,
                f"{run['seconds']:.0f}",
                f"{run['trainable_parameters']:,}",
                f"{run['stored_bytes'] / 1e6:.1f}",
            )
    console.print(summary)
