"""Results of a stream as tables, and how a terminal shows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from peft_moe_merge.report.statistics import RULE, Estimate, equivalence, estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import Rows, difference, number, print_table, spread, terminal

from ..results import METRICS
from .anchors import anchor_notes, anchor_values

BASELINE = "moe_adapters"
"""The method that the others are compared with, unless another is named."""

COMPARED = METRICS[:3]  # what the paper's tables show
DECISIONS = ("per_image", "per_batch", "candidates", "soft")
SELECTION_CAPTION = (
    "Nobody names the task: a selector chooses it, or none of them, which is plain CLIP. Δ Last: to the true task. "
    "right: the image's task, or none if it is not learnt yet, over all data sets and stages. AUROC: telling images of "
    "tasks not learnt yet from the others, mean over stages. Deciding a batch of one data set together is far easier "
    f"than deciding image by image. {RULE}"
)
X_TAIL_CAPTION = (
    "X-TAIL: an image is told apart among the classes of all tasks, learnt or not, each name once; nobody names its task. A "
    "task that was chosen tells all classes apart, or its own alone; CLIP without experts always all. Fused: the selector has a say "
    f"in the classes, too. {RULE}"
)
X_TAIL_LABELS = {
    "per_image": "one task, all classes",
    "soft": "likely tasks mixed, all classes",
    "per_image_own": "one task, its classes",
    "soft_own": "likely tasks mixed, their classes",
    "soft_fused": "likely tasks mixed, their classes fused",
}

DIFFERENCE_CAPTION = (
    "Percentage points, mean over common seeds of the differences seed by seed, with Student's 95 % interval."
)
EQUIVALENCE_CAPTION = (
    "Equal: two one-sided t tests on the differences seed by seed show at 5 % that they lie within the margin, in percentage "
    "points. Not shown: they do not, which does not mean that the methods differ."
)


def matrix_rows(tasks: list[str], run: dict[str, Any]) -> Rows:
    """Lay out one run's accuracy matrix, with Transfer, Average and Last of every task below it."""
    rows = [["after", *tasks, "mean"]]
    for task, row in zip(tasks, run["matrix"], strict=True):
        rows.append([task, *map(number, row), number(sum(row) / len(row))])
    for metric in COMPARED:
        if f"{metric}_per_task" in run:
            rows.append([metric.capitalize(), *map(number, run[f"{metric}_per_task"]), number(run.get(metric))])
    return rows


def task_rows(results: dict[str, Any], metric: str) -> Rows:
    """Lay out a metric of every method, per task and in the mean, with intervals over seeds.

    Below them the published numbers, if there are any.
    """
    tasks = results["tasks"]
    rows = [["method", *tasks, "mean"]]
    for name, runs in results["methods"].items():
        known = [run[f"{metric}_per_task"] for run in runs if f"{metric}_per_task" in run]
        per_task = [estimate([values[task] for values in known]) for task in range(len(tasks))]
        rows.append([name, *map(spread, per_task), spread(over_seeds(runs, metric))])
    for label, values in anchor_values(results, metric).items():
        published = [value for value in values if value is not None]
        rows.append([label, *map(number, values), number(_mean(published))])
    return rows


def summary_rows(results: dict[str, Any]) -> Rows:
    """Lay out one row per method: the metrics with intervals, and what a run takes."""
    rows = [["method", "seeds", *map(str.capitalize, METRICS), "minutes", "trainable", "stored MB"]]
    for name, runs in results["methods"].items():
        seconds, stored = (over_seeds(runs, key).mean for key in ("seconds", "stored_bytes"))
        trainable = max((run["trainable_parameters"] for run in runs if "trainable_parameters" in run), default=None)
        rows.append(
            [
                name,
                str(len(runs)),
                *(spread(over_seeds(runs, metric), 2) for metric in METRICS),
                "-" if seconds is None else number(seconds / 60),
                "-" if trainable is None else f"{trainable:,}",
                "-" if stored is None else number(stored / 1e6),
            ]
        )
    return rows


def difference_rows(results: dict[str, Any], baseline: str = BASELINE) -> Rows:
    """Lay out by how much each method exceeds a baseline, seed by seed, with intervals.

    Returns:
        The table; without rows if the baseline was not run, or nothing else was.
    """
    return _against(results, baseline, f"difference to {baseline}", lambda values: difference(estimate(values)))


def equivalence_rows(results: dict[str, Any], margin: float, baseline: str = BASELINE) -> Rows:
    """Lay out whether each method is shown to equal a baseline but for a margin.

    Args:
        results: what `read_results` returns.
        margin: in percentage points.
        baseline: the method to compare with.

    Returns:
        The table; without rows if the baseline was not run, or nothing else was.
    """
    heading = f"{baseline} within ±{margin:g}"
    return _against(results, baseline, heading, lambda values: equivalence_verdict(values, margin))


def _against(results: dict[str, Any], baseline: str, heading: str, cell: Callable[[list[float]], str]) -> Rows:
    methods = results["methods"]
    others = [name for name in methods if name != baseline]
    if baseline not in methods or not others:
        return []
    rows = [[heading, "seeds", *map(str.capitalize, METRICS)]]
    for name in others:
        seeds = {run["seed"] for run in methods[name]} & {run["seed"] for run in methods[baseline]}
        differences = (paired_differences(methods[name], methods[baseline], metric) for metric in METRICS)
        rows.append([name, str(len(seeds)), *map(cell, differences)])
    return rows


def equivalence_verdict(differences: list[float], margin: float) -> str:
    """Say whether two methods are shown to be equal but for a margin, with the p-value; "-" for a single seed."""
    tested = equivalence(differences, margin)
    if tested.p_value is None:
        return "-"
    shown = "equal" if tested.holds else "not shown"
    return f"{shown}, p={tested.p_value:.3f}" if tested.p_value >= 0.0005 else f"{shown}, p<0.001"


def selection_rows(results: dict[str, Any]) -> Rows:
    """Lay out one row per method, selector and decision: what the metrics become when nobody names the task.

    Empty if no run has selectors. "right" counts all data sets and stages: the image's task, or none if not learnt.
    """
    heading = ["method", "task chosen by", "decided", *map(str.capitalize, COMPARED), "Δ Last"]
    rows = [[*heading, "right %", "AUROC of none", "bytes a task"]]
    for method, runs in results["methods"].items():
        names = selectors(runs)
        if names:
            truth = [spread(over_seeds(runs, metric), 2) for metric in COMPARED]
            rows.append([method, "the true task", "", *truth, "", "100.0", "-", ""])
        for name in names:
            for decision in DECISIONS:
                if row := _selection_row(runs, name, decision):
                    rows.append([method, name, decision_label(results, decision), *row])
    return rows if len(rows) > 1 else []


def _selection_row(runs: list[dict[str, Any]], selector: str, decision: str) -> list[str]:
    known = [run for run in runs if decision in _selection(run, selector)]
    if not known:
        return []

    def chosen(run: dict[str, Any]) -> dict[str, Any]:
        return run["selection"][selector][decision]

    added = next((_selection(run, selector).get("bytes_per_task") for run in known), None)
    gaps = [
        None if run.get("last") is None or chosen(run).get("last") is None else chosen(run)["last"] - run["last"]
        for run in known
    ]
    right = over_seeds(
        known, lambda run: _mean(share for stage in chosen(run).get("selected_right", ()) for share in stage)
    )
    auroc = over_seeds(known, lambda run: _mean(value for value in chosen(run).get("auroc", ()) if value is not None))
    return [
        *(spread(over_seeds(list(map(chosen, known)), metric), 2) for metric in COMPARED),
        _signed(estimate(gaps)),
        spread(right),
        spread(auroc, 3),
        "-" if added is None else f"{added:,}",
    ]


def x_tail_runs(results: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Gather the metrics of X-TAIL of all seeds, by method, who chose the task, and how it was decided."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for method, runs in results["methods"].items():
        for run in runs:
            for told in run.get("x_tail") or []:
                how = ("nobody", "all classes")
                if told["selector"] is not None:
                    how = told["selector"], X_TAIL_LABELS.get(told["decision"], told["decision"])
                found.setdefault((method, *how), []).append({"seed": run["seed"], **told})
    return found


def x_tail_rows(results: dict[str, Any]) -> Rows:
    """Lay out one row per method, selector and decision: the metrics of X-TAIL. Empty if no run has any."""
    rows = [["method", "task chosen by", "decided", *map(str.capitalize, COMPARED)]]
    for how, of_seeds in x_tail_runs(results).items():
        rows.append([*how, *(spread(over_seeds(of_seeds, metric), 2) for metric in COMPARED)])
    return rows if len(rows) > 1 else []


def selected_rows(results: dict[str, Any]) -> Rows:
    """Lay out, per selector and decision, how many percent of each task's images got their task when all are learnt."""
    rows = [["method", "task chosen by", "decided", *results["tasks"], "mean"]]
    for method, runs in results["methods"].items():
        for name in selectors(runs):
            for decision in DECISIONS:
                known = [_selection(run, name).get(decision, {}).get("selected_right") for run in runs]
                shares = [stages[-1] for stages in known if stages]
                if shares:
                    means = [estimate(values).mean for values in zip(*shares, strict=True)]
                    label = decision_label(results, decision)
                    rows.append([method, name, label, *map(number, means), number(_mean(means))])
    return rows


def selectors(runs: list[dict[str, Any]]) -> list[str]:
    """Name the selectors that any of a method's runs has results of."""
    return list(dict.fromkeys(name for run in runs for name in run.get("selection") or {}))


def decision_label(results: dict[str, Any], decision: str) -> str:
    """Name a decision; that for many images at once by their number."""
    if decision == "per_image":
        return "per image"
    if decision == "candidates":
        return "per image, the data set's classes given"
    if decision == "soft":
        return "likely tasks mixed"
    return f"per batch of {(results.get('settings') or {}).get('selector_batch', '?')}"


def summary_caption() -> str:
    """Say what the numbers of `summary_rows` are."""
    return f"Percent, means over seeds; minutes and megabytes are those of one run. {RULE}"


def print_results(
    results: dict[str, Any],
    console: Console | None = None,
    baseline: str = BASELINE,
    margin: float | None = None,
) -> None:
    """Print the accuracy matrix of every method that has one seed, then the methods side by side."""
    console = console or terminal()
    tasks = results["tasks"]
    for name, runs in results["methods"].items():
        if len(runs) == 1:
            title = f"{name}, seed {runs[0]['seed']}"
            caption = "accuracy in %; rows: after training the task, columns: tested on"
            print_table(console, matrix_rows(tasks, runs[0]), title, caption, sections=[len(tasks)])
    for metric in COMPARED:
        print_table(console, task_rows(results, metric), metric.capitalize(), "accuracy in %")
    if rows := selection_rows(results):
        print_table(
            console, selected_rows(results), "Right task chosen when all are learnt", "in % of a task's images"
        )
        print_table(console, rows, "Choosing the task", SELECTION_CAPTION)
    if rows := x_tail_rows(results):
        print_table(console, rows, "X-TAIL", X_TAIL_CAPTION)
    for note in anchor_notes(results):
        console.print(Text(note))
    print_table(console, summary_rows(results), f"suite {results['suite']}", summary_caption())
    if rows := difference_rows(results, baseline):
        print_table(console, rows, f"Against {baseline}", DIFFERENCE_CAPTION)
    if margin is not None and (rows := equivalence_rows(results, margin, baseline)):
        print_table(console, rows, f"Equal to {baseline}?", EQUIVALENCE_CAPTION)


def _selection(run: dict[str, Any], selector: str) -> dict[str, Any]:
    return (run.get("selection") or {}).get(selector) or {}


def _signed(known: Estimate) -> str:
    half = "" if known.half is None else f" ±{known.half:.2f}"
    return "-" if known.mean is None else f"{known.mean:+.2f}{half}"


def _mean(values: Any) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None
