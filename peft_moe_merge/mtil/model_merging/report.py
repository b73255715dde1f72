"""Tables, a picture and a page of the comparison. Reads results only, never a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.console import Console

from peft_moe_merge.report.page import Section, TextTable, page, picture, write_report_files
from peft_moe_merge.report.plots import BLUE, STYLE
from peft_moe_merge.report.statistics import RULE, over_seeds
from peft_moe_merge.report.tables import Rows, number, print_table, spread, terminal

ADAPTERS = ("wemoe", "e_wemoe", "smile")
ROBUSTNESS_CAPTION = "Adapted on images corrupted alike. Average over tasks, and below it the worst task of each seed."


def average(row: dict[str, float]) -> float | None:
    """Return the mean over tasks, None without any."""
    return sum(row.values()) / len(row) if row else None


def accuracy_rows(results: dict[str, Any]) -> Rows:
    """Lay out each method's accuracy per task and on average, and what it costs."""
    tasks = results["runs"][0]["tasks"]
    rows = [["method", *tasks, "average", "trainable", "stored M", "seconds"]]
    for method, of_seeds in _per_method(results):
        trainable, stored = (of_seeds[0].get(key) for key in ("trainable_parameters", "stored_numbers"))
        rows.append(
            [
                method,
                *(spread(over_seeds(of_seeds, lambda row, task=task: row["accuracy"].get(task))) for task in tasks),
                spread(over_seeds(of_seeds, lambda row: average(row["accuracy"]))),
                "-" if trainable is None else f"{trainable:,}",
                "-" if stored is None else f"{stored / 1e6:.2f}",
                number(over_seeds(of_seeds, "seconds").mean, 0),
            ]
        )
    return rows


def held_out_rows(results: dict[str, Any]) -> Rows:
    """Lay out each method's accuracy on tasks that no model was fine-tuned on; without rows if there are none."""
    held_out = results["runs"][0].get("held_out") or []
    rows = [["method", *held_out, "average"]]
    for method, of_seeds in _per_method(results):
        known = [row["held_out"] for row in of_seeds if row.get("held_out")]
        if known:
            cells = [spread(over_seeds(known, task)) for task in held_out]
            rows.append([method, *cells, spread(over_seeds(known, average))])
    return rows if held_out else []


def robustness_rows(results: dict[str, Any]) -> Rows:
    """Lay out each method's accuracy on corrupted images: on average and, below it, on the worst task."""
    runs = [run["robustness"] for run in results["runs"] if run.get("robustness")]
    corruptions = list(dict.fromkeys(corruption for run in runs for corruption in run))
    methods = dict.fromkeys(method for run in runs for of_methods in run.values() for method in of_methods)
    rows = [["method", *corruptions]]
    for method in methods:
        per_corruption = [
            [run[corruption][method] for run in runs if method in run.get(corruption, ())]
            for corruption in corruptions
        ]
        rows.append([method, *(spread(over_seeds(of_seeds, average)) for of_seeds in per_corruption)])
        worst = (over_seeds(of_seeds, lambda row: min(row.values(), default=None)) for of_seeds in per_corruption)
        rows.append([f"{method}, worst task", *map(spread, worst)])
    return rows if methods else []


def print_report(results: dict[str, Any], console: Console | None = None) -> None:
    """Print accuracy per task for each method, then held-out tasks, then corrupted images."""
    console = console or terminal()
    for table in _tables(results):
        print_table(console, table.rows, table.title, table.note)


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `report.html`, and its picture also as `average.png`. Each file appears complete or not at all.

    Returns:
        The files written, the page last.
    """
    with matplotlib.rc_context(STYLE):
        drawn = picture(
            "average",
            average_figure(results),
            f"Mean over {len(results['runs'][0]['tasks'])} tasks and over seeds, with Student's 95 % interval where there are "
            "several; dots: seeds. Blue: methods with routers or chosen experts.",
        )
    seeds = ", ".join(str(run.get("seed", position)) for position, run in enumerate(results["runs"]))
    settings = results.get("settings") or results["runs"][0].get("settings") or {}
    rows = [["setting", "value"], *([name, str(value)] for name, value in settings.items())]
    html = page(
        f"Merging {len(results['runs'][0]['tasks'])} fine-tuned models: suite {results['suite']}",
        f"Seeds: {seeds}.",
        [
            Section("Accuracy", [drawn, *_tables(results)]),
            Section("Settings", [TextTable(rows, text=True)] if settings else []),
        ],
    )
    return write_report_files(folder, "report.html", html, [drawn])


def average_figure(results: dict[str, Any]) -> Figure:
    """Draw each method's average over tasks, with its interval and a mark for each seed."""
    per_method = _per_method(results)
    figure = Figure(figsize=(7, 0.35 * len(per_method) + 1.2), layout="constrained")
    axes = figure.subplots()
    for position, (method, of_seeds) in enumerate(per_method):
        values = [average(row["accuracy"]) for row in of_seeds]
        known = over_seeds(of_seeds, lambda row: average(row["accuracy"]))
        axes.barh(position, known.mean, color=BLUE if method.startswith(ADAPTERS) else "#bbbbbb", height=0.7)
        if known.half is not None:
            axes.plot([known.low, known.high], [position] * 2, color="black", linewidth=1.2, marker="|")
        axes.plot(values, [position] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(per_method)), [method for method, _ in per_method])
    axes.invert_yaxis()
    axes.set_xlim(0, None)
    axes.set_xlabel("accuracy (%)")
    return figure


def _tables(results: dict[str, Any]) -> list[TextTable]:
    runs = results["runs"]
    transductive = (runs[0].get("settings") or {}).get("transductive", False)
    adapted = "the test images themselves (transductive)" if transductive else "a disjoint split"
    tables = [
        TextTable(
            accuracy_rows(results),
            f"Adapting methods saw unlabelled images of {adapted}. Seconds: to merge and adapt, or to train jointly; the time "
            f"to fine-tune the copies is not in them. {RULE}",
            f"{results['suite']}: accuracy in %, {len(runs)} seed(s)",
        )
    ]
    if rows := held_out_rows(results):
        tables.append(TextTable(rows, RULE, "Tasks that no model was fine-tuned on"))
    if rows := robustness_rows(results):
        tables.append(TextTable(rows, f"{ROBUSTNESS_CAPTION} {RULE}", "Corrupted images: average and worst task"))
    return tables


def _per_method(results: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of all seeds, method by method; a seed that lacks a method is left out there."""
    methods = dict.fromkeys(method for run in results["runs"] for method in run["rows"])
    return [(method, [run["rows"][method] for run in results["runs"] if method in run["rows"]]) for method in methods]
