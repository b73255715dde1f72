"""Tables, pictures and a page of the comparison. Reads results only, never a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from peft_moe_merge.report.page import Picture, Section, TextTable, page, picture, write_report_files
from peft_moe_merge.report.plots import BLUE, STYLE, heat_map, look
from peft_moe_merge.report.statistics import RULE, estimate, over_seeds
from peft_moe_merge.report.tables import Rows, difference, number, print_table, spread, terminal

from .study import STATIC

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


def best_static(results: dict[str, Any]) -> str | None:
    """Return the static merge with the best average over tasks and seeds, None without any.

    It is chosen by the results it is then compared with, which favours it.
    """
    means = {
        method: over_seeds(of_seeds, lambda row: average(row["accuracy"])).mean
        for method, of_seeds in _per_method(results)
        if method in STATIC
    }
    return max(means, key=means.get, default=None)


def difference_rows(results: dict[str, Any]) -> Rows:
    """Lay out how far each method is above the best static merge, seed by seed; without rows if there is none."""
    best = best_static(results)
    if best is None:
        return [["method"]]
    runs = [{method: average(row["accuracy"]) for method, row in run["rows"].items()} for run in results["runs"]]
    rows = [["method", f"above {best}", "seeds"]]
    for method, _ in _per_method(results):
        gaps = [of_run[method] - of_run[best] for of_run in runs if method in of_run and best in of_run]
        if method != best and gaps:
            rows.append([method, difference(estimate(gaps)), str(len(gaps))])
    return rows


def group_rows(results: dict[str, Any]) -> Rows:
    """Lay out each method's average over the tasks of each group, and of all tasks; without rows if there are no groups."""
    groups = _groups(results)
    methods = dict.fromkeys(method for of_group in groups.values() for run in of_group for method in run)
    rows = [["method", *groups]]
    for method in methods:
        cells = [[run[method] for run in of_group if method in run] for of_group in groups.values()]
        rows.append([method, *(spread(over_seeds(of, lambda row: average(row["accuracy"]))) for of in cells)])
    return rows if methods else []


def _groups(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """For each group, and for all tasks, what its methods came to in each seed."""
    runs = [run for run in results["runs"] if run.get("groups")]
    names = dict.fromkeys(name for run in runs for name in run["groups"])
    groups = {name: [run["groups"][name] for run in runs if name in run["groups"]] for name in names}
    grouped = {method for of_group in groups.values() for run in of_group for method in run}
    if groups:
        whole = [{m: row for m, row in run["rows"].items() if m in grouped} for run in runs]
        groups[f"{len(runs[0]['tasks'])} (all)"] = whole
    return groups


def groups_figure(results: dict[str, Any]) -> Figure:
    """Draw accuracy by number of tasks, of the groups that are called by it and of all tasks."""
    sizes = {int(name.split()[0]): of for name, of in _groups(results).items() if name.split()[0].isdigit()}
    methods = dict.fromkeys(method for of_group in sizes.values() for run in of_group for method in run)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for position, method in enumerate(methods):
        known = {
            size: over_seeds([r[method] for r in of if method in r], lambda row: average(row["accuracy"]))
            for size, of in sorted(sizes.items())
        }
        known = {size: estimated for size, estimated in known.items() if estimated.mean is not None}
        means, halves = [e.mean for e in known.values()], [e.half or 0.0 for e in known.values()]
        x = [size + 0.06 * (position - len(methods) / 2) for size in known]  # intervals side by side
        axes.errorbar(x, means, halves, label=method, capsize=2, **look(position))
    axes.set_xticks(sorted(sizes))
    axes.set_xlabel("tasks merged")
    axes.set_ylabel("accuracy (%), mean over the tasks merged")
    axes.legend(fontsize=8, ncols=2)
    return figure


def gates_figure(results: dict[str, Any], method: str) -> Figure:
    """Draw the gate of an image's own task, by task and block, beside the mean of the other tasks' gates."""
    of_seeds = [run["rows"][method]["gates"] for run in results["runs"] if "gates" in run["rows"].get(method, {})]
    tasks = list(of_seeds[0])
    gates_TLT = np.mean([[gates[task] for task in tasks] for gates in of_seeds], axis=0)
    own_TL = np.stack([gates_TLT[place, :, place] for place in range(len(tasks))])
    others_TL = (gates_TLT.sum(-1) - own_TL) / max(1, len(tasks) - 1)
    figure = Figure(figsize=(9, 0.36 * len(tasks) + 1.6), layout="constrained")
    high = max(own_TL.max(), others_TL.max())
    blocks = [f"block {block}" for block in range(own_TL.shape[1])]
    for axes, values, title in zip(
        figure.subplots(1, 2), (own_TL, others_TL), ("own task", "mean of the others"), strict=True
    ):
        heat_map(axes, values, blocks, tasks, "gate", high=high, digits=2)
        axes.set_title(title)
    return figure


def pictures(results: dict[str, Any]) -> list[Picture]:
    """Draw all that the results have: averages, numbers of tasks, gates."""
    seeds = "over seeds, with Student's 95 % interval where there are several"
    count = len(results["runs"][0]["tasks"])
    bars = f"Mean over {count} tasks and {seeds}; dots: seeds. Blue: methods with routers or chosen experts."
    drawn = [picture("average", average_figure(results), bars)]
    if any(name.split()[0].isdigit() for name in _groups(results)):
        drawn.append(picture("number_of_tasks", groups_figure(results), f"Mean over the tasks merged and {seeds}."))
    with_gates = dict.fromkeys(m for run in results["runs"] for m, row in run["rows"].items() if "gates" in row)
    for method in with_gates:
        caption = (
            f"{method}: gates for the test images of each task, mean over images and seeds. 0.3 is where they start."
        )
        drawn.append(picture(f"gates_{method}", gates_figure(results, method), caption))
    return drawn


def print_report(results: dict[str, Any], console: Console | None = None) -> None:
    """Print accuracy per task for each method, then held-out tasks, then corrupted images."""
    console = console or terminal()
    for table in _tables(results):
        print_table(console, table.rows, table.title, table.note)


def write_report(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write `report.html`, and its pictures also as `<name>.png`. Each file appears complete or not at all.

    Returns:
        The files written, the page last.
    """
    with matplotlib.rc_context(STYLE):
        drawn = pictures(results)
    seeds = ", ".join(str(run.get("seed", position)) for position, run in enumerate(results["runs"]))
    settings = results.get("settings") or results["runs"][0].get("settings") or {}
    rows = [["setting", "value"], *([name, str(value)] for name, value in settings.items())]
    html = page(
        f"Merging {len(results['runs'][0]['tasks'])} fine-tuned models: suite {results['suite']}",
        f"Seeds: {seeds}.",
        [
            Section("Accuracy", [*drawn, *_tables(results)]),
            Section("Settings", [TextTable(rows, text=True)] if settings else []),
        ],
    )
    return write_report_files(folder, "report.html", html, drawn)


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
    if len(rows := difference_rows(results)) > 1:
        note = "Averages over tasks, seed by seed. The best static merge is chosen by these results, which favours it."
        tables.append(TextTable(rows, f"{note} {RULE}", "Differences to the best static merge, in points"))
    if rows := group_rows(results):
        tables.append(TextTable(rows, RULE, "Some of the tasks alone: averages over them"))
    if rows := held_out_rows(results):
        tables.append(TextTable(rows, RULE, "Tasks that no model was fine-tuned on"))
    if rows := robustness_rows(results):
        tables.append(TextTable(rows, f"{ROBUSTNESS_CAPTION} {RULE}", "Corrupted images: average and worst task"))
    return tables


def _per_method(results: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of all seeds, method by method; a seed that lacks a method is left out there."""
    methods = dict.fromkeys(method for run in results["runs"] for method in run["rows"])
    return [(method, [run["rows"][method] for run in results["runs"] if method in run["rows"]]) for method in methods]
