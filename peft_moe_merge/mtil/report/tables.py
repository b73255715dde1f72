"""Results as tables: rows of text, the first of which is the header, and how a terminal shows them."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..results import METRICS
from .anchors import anchor_notes, anchor_values
from .statistics import BASELINE, Estimate, estimate, over_seeds, paired_difference, per_task

Rows = list[list[str]]
COMPARED = METRICS[:3]  # what the paper's tables show
WIDTH = 180  # of a terminal that is none, such as a file


def matrix_rows(tasks: list[str], run: dict[str, Any]) -> Rows:
    """Lay out one run's accuracy matrix, with Transfer, Average and Last of every task below it."""
    rows = [["after", *tasks, "mean"]]
    for task, row in zip(tasks, run["matrix"], strict=True):
        rows.append([task, *map(number, row), number(sum(row) / len(row))])
    for metric in COMPARED:
        rows.append([metric.capitalize(), *map(number, run[f"{metric}_per_task"]), number(run[metric])])
    return rows


def task_rows(results: dict[str, Any], metric: str) -> Rows:
    """Lay out a metric of every method, per task and in the mean, with the standard deviation over seeds.

    Below them the published numbers, if there are any.
    """
    rows = [["method", *results["tasks"], "mean"]]
    for name, runs in results["methods"].items():
        rows.append([name, *map(spread, per_task(runs, metric)), spread(over_seeds(runs, metric))])
    for label, values in anchor_values(results, metric).items():
        known = [value for value in values if value is not None]
        rows.append([label, *map(number, values), number(sum(known) / len(known) if known else None)])
    return rows


def summary_rows(results: dict[str, Any], baseline: str = BASELINE) -> Rows:
    """Lay out one row per method: the metrics and, if the baseline was run, the paired differences to it."""
    methods = results["methods"]
    rows = [["method", "seeds"]]
    for metric in METRICS:
        rows[0] += [metric.capitalize()] + ["Δ"] * (metric in COMPARED and baseline in methods)
    rows[0] += ["minutes", "trainable", "stored MB"]
    for name, runs in methods.items():
        row = [name, str(len(runs))]
        for metric in METRICS:
            row.append(spread(over_seeds(runs, metric), 2))
            if metric in COMPARED and baseline in methods:
                row.append("" if name == baseline else difference(paired_difference(runs, methods[baseline], metric)))
        seconds, stored = (sum(run[key] for run in runs) / len(runs) for key in ("seconds", "stored_bytes"))
        trainable = max(run["trainable_parameters"] for run in runs)
        rows.append([*row, f"{seconds / 60:.1f}", f"{trainable:,}", f"{stored / 1e6:.1f}"])
    return rows


def selection_rows(results: dict[str, Any]) -> Rows:
    """Lay out one row per method, selector and decision: what the metrics become when nobody names the task.

    Empty if no run tells of selectors. "right" counts all data sets and stages: the own task, or none if not learnt.
    """
    rows = []
    for method, runs in results["methods"].items():
        names = runs[0].get("selection") or {}
        if not names:
            continue
        truth = [spread(over_seeds(runs, metric), 2) for metric in COMPARED]
        rows.append([method, "the true task", "", *truth, "", "100.0", "-", ""])
        for name in names:
            for decision, label in decisions(results, runs[0]["selection"][name]):
                told = [run["selection"][name][decision] for run in runs]
                right = estimate(
                    [_mean([share for stage in one["selected_right"] for share in stage]) for one in told]
                )
                auroc = estimate([_mean([value for value in one["auroc"] if value is not None]) for one in told])
                gap = estimate([one["last"] - run["last"] for one, run in zip(told, runs, strict=True)])
                rows.append(
                    [
                        method,
                        name,
                        label,
                        *(spread(over_seeds(told, metric), 2) for metric in COMPARED),
                        "" if gap.mean is None else f"{gap.mean:+.2f}",
                        spread(right),
                        spread(auroc, 3),
                        f"{runs[0]['selection'][name]['bytes_per_task']:,}",
                    ]
                )
    heading = ["method", "task chosen by", "decided", *map(str.capitalize, COMPARED), "Δ Last"]
    return [[*heading, "right %", "AUROC of none", "bytes a task"], *rows] if rows else []


def selected_rows(results: dict[str, Any]) -> Rows:
    """Lay out, per selector and decision, how many percent of each task's images got their task when all are learnt."""
    rows = [["method", "task chosen by", "decided", *results["tasks"], "mean"]]
    for method, runs in results["methods"].items():
        for name in runs[0].get("selection") or {}:
            for decision, label in decisions(results, runs[0]["selection"][name]):
                shares = zip(*(run["selection"][name][decision]["selected_right"][-1] for run in runs), strict=True)
                estimates = [estimate(values) for values in shares]
                mean = number(_mean([one.mean for one in estimates]))
                rows.append([method, name, label, *(number(one.mean) for one in estimates), mean])
    return rows


def decisions(results: dict[str, Any], told: dict[str, Any]) -> list[tuple[str, str]]:
    """List how a selector chose tasks: as results name it, and in words."""
    asked = ("candidates", "per image, the data set's classes given")
    named = [("per_image", "per image"), ("per_batch", batch_label(results)), asked]
    return [(decision, label) for decision, label in named if decision in told]


def batch_label(results: dict[str, Any]) -> str:
    """Name the decision for many images at once by their number."""
    return f"per batch of {results['settings'].get('selector_batch', '?')}"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


SELECTION_CAPTION = (
    "Nobody names the task: a selector chooses it, or none of them, which is plain CLIP. Δ Last: to the true task. "
    "right: the own task, or none if it is not learnt yet, over all data sets and stages. AUROC: telling images of "
    "tasks not learnt yet from the others, mean over stages. Deciding a batch of one data set together is far easier "
    "than deciding image by image."
)


def summary_caption(results: dict[str, Any], baseline: str = BASELINE) -> str:
    """Say what the numbers of `summary_rows` are."""
    text = "Percent; mean ± standard deviation over seeds; minutes and megabytes are those of one run. "
    if baseline not in results["methods"]:
        return f"{text}{baseline} was not run, so there is no difference to it."
    return f"{text}Δ: paired difference to {baseline} over common seeds, with its 95 % bootstrap interval."


def number(value: float | None) -> str:
    """Write an accuracy."""
    return "-" if value is None else f"{value:.1f}"


def spread(known: Estimate, digits: int = 1) -> str:
    """Write a mean with its standard deviation, if there is one."""
    if known.mean is None:
        return "-"
    deviation = "" if known.std is None else f" ±{known.std:.{digits}f}"
    return f"{known.mean:.{digits}f}{deviation}"


def difference(known: Estimate) -> str:
    """Write a difference with its interval, if there is one."""
    if known.mean is None:
        return "-"
    interval = "" if known.low is None else f" [{known.low:+.2f},{known.high:+.2f}]"
    return f"{known.mean:+.2f}{interval}"


def print_results(results: dict[str, Any], console: Console | None = None, baseline: str = BASELINE) -> None:
    """Print the accuracy matrix of every method that has one seed, then the methods side by side."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for name, runs in results["methods"].items():
        if len(runs) == 1:
            title = f"{name}, seed {runs[0]['seed']}"
            caption = "accuracy in %; rows: after training the task, columns: tested on"
            console.print(
                _table(matrix_rows(results["tasks"], runs[0]), title, caption, sections=[len(results["tasks"])])
            )
    for metric in COMPARED:
        console.print(_table(task_rows(results, metric), metric.capitalize(), "accuracy in %"))
    if rows := selection_rows(results):
        console.print(_table(selected_rows(results), "Own task chosen when all are learnt", "in % of a task's images"))
        console.print(_table(rows, "Choosing the task", SELECTION_CAPTION))
    for note in anchor_notes(results):
        console.print(Text(note))
    console.print(
        _table(summary_rows(results, baseline), f"suite {results['suite']}", summary_caption(results, baseline))
    )


def _table(rows: Rows, title: str, caption: str, sections: list[int] = ()) -> Table:
    table = Table(title=Text(title), caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="right" if position else "left", overflow="fold", no_wrap=not position)
    for count, row in enumerate(rows[1:], start=1):
        table.add_row(*map(Text, row), end_section=count in sections)
    return table
