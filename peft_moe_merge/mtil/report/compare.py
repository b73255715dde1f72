"""Two runs side by side: what they differ in, and by how much the second exceeds the first, seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_moe_merge.files import whole
from peft_moe_merge.report.page import Section, TextTable, Words, page
from peft_moe_merge.report.statistics import RULE, Estimate, estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import Rows, difference, number

from ..fingerprint import MAY_DIFFER
from ..results import METRICS
from .summary import interval_words
from .tables import EQUIVALENCE_CAPTION, equivalence_verdict

PAGE = "comparison.html"
COMPARISON_CAPTION = (
    "B minus A in percentage points, mean over common seeds of the differences seed by seed, with Student's 95 % interval. A and "
    "B in percent, over the same seeds."
)
TASKS_CAPTION = "The same for the accuracy on each task at the end of the stream."
ALIKE = "Nothing that is recorded: settings, data, model and versions are the same."

Results = dict[str, Any]
Runs = list[dict[str, Any]]


def common_runs(a: Results, b: Results) -> dict[str, tuple[Runs, Runs]]:
    """Pair the runs of both: per method that both have, A's and B's runs with the seeds that both have.

    Args:
        a, b: what `read_results` returns.

    Raises:
        ValueError: the tasks are not the same, or there are no runs to pair.
    """
    if set(a["tasks"]) != set(b["tasks"]):
        raise ValueError(
            f"The runs learn other tasks and can't be compared: A has {a['tasks']}, B has {b['tasks']}. Give two runs of "
            "the same tasks."
        )
    pairs = {}
    for method in a["methods"].keys() & b["methods"].keys():
        seeds = {run["seed"] for run in a["methods"][method]} & {run["seed"] for run in b["methods"][method]}
        if seeds:
            pairs[method] = tuple([run for run in of["methods"][method] if run["seed"] in seeds] for of in (a, b))
    if not pairs:
        raise ValueError(
            f"The runs have no method with a common seed: A has {_seeds(a)}, B has {_seeds(b)}. Run one of them with "
            "the other's methods and seeds."
        )
    return {method: pairs[method] for method in a["methods"] if method in pairs}


def comparison_rows(a: Results, b: Results) -> Rows:
    """Lay out, method by method, Last of both runs and the differences of all metrics. Raises what `common_runs` raises."""
    rows = [["method", "seeds", "Last of A", "Last of B", *(f"Δ {metric.capitalize()}" for metric in METRICS)]]
    for method, (ours, theirs) in common_runs(a, b).items():
        last = (number(over_seeds(runs, "last").mean, 2) for runs in (ours, theirs))
        changes = (difference(estimate(paired_differences(theirs, ours, metric))) for metric in METRICS)
        rows.append([method, str(len(ours)), *last, *changes])
    return rows


def task_comparison_rows(a: Results, b: Results) -> Rows:
    """Lay out the differences of each task's accuracy at the end. Raises what `common_runs` raises."""
    rows = [["method", *a["tasks"]]]
    for method, (ours, theirs) in common_runs(a, b).items():
        cells = []
        for task in a["tasks"]:
            of_a, of_b = (
                {run["seed"]: _at_end(of, run, task) for run in runs} for of, runs in ((a, ours), (b, theirs))
            )
            cells.append(difference(estimate([of_b[seed] - of_a[seed] for seed in of_a])))
        rows.append([method, *cells])
    return rows


def equivalence_comparison_rows(a: Results, b: Results, margin: float) -> Rows:
    """Lay out whether the two runs are shown to be equal but for a margin, in percentage points, method by method."""
    rows = [[f"A within ±{margin:g} of B", *map(str.capitalize, METRICS)]]
    for method, (ours, theirs) in common_runs(a, b).items():
        verdicts = (equivalence_verdict(paired_differences(theirs, ours, metric), margin) for metric in METRICS)
        rows.append([method, *verdicts])
    return rows


def what_differs(a: Results, b: Results) -> Rows:
    """List what two runs differ in, of what shapes a result: settings, data, weights and versions; a header alone if nothing."""
    rows = [["", "A", "B"]]
    if a["tasks"] != b["tasks"]:
        rows.append(["order of the tasks", ", ".join(a["tasks"]), ", ".join(b["tasks"])])
    told = [{**(of.get("settings") or {}), **(of.get("fingerprint") or {})} for of in (a, b)]
    for ours, theirs in (told, [of.get("versions") or {} for of in (a, b)]):
        names = [name for name in {**ours, **theirs} if name not in MAY_DIFFER and name != "tasks"]
        rows += [
            [name, str(ours.get(name, "-")), str(theirs.get(name, "-"))]
            for name in names
            if ours.get(name) != theirs.get(name)
        ]
    return rows


def comparison_words(a: Results, b: Results) -> list[str]:
    """Say, method by method, which run is better at the end, by how much, and what is uncertain.

    Raises:
        ValueError: see `common_runs`.
    """
    pairs = common_runs(a, b)
    changes = {method: estimate(paired_differences(theirs, ours, "last")) for method, (ours, theirs) in pairs.items()}
    said = [_sentence(method, change) for method, change in changes.items()]
    if sum(change.half is not None for change in changes.values()) > 1:
        said.append("The intervals hold one by one; they are not widened for there being several.")
    left = [
        f"{', '.join(alone)} only in {name}"
        for name, of in (("A", a), ("B", b))
        if (alone := [method for method in of["methods"] if method not in pairs])
    ]
    if left:
        said.append(f"Not compared, for want of a common seed: {'; '.join(left)}.")
    return said


def _sentence(method: str, change: Estimate) -> str:
    if change.mean == 0 and not change.half:
        return f"{method}: Last is the same in A and B."
    size = f"{abs(change.mean):.2f} points {'higher' if change.mean > 0 else 'lower'} in B"
    if change.half is None:
        return f"{method}: Last is {size}, with one seed; another seed may say otherwise."
    told = f"Last is {size}{interval_words(change, 2)}."
    if change.low <= 0 <= change.high:
        return f"{method}: these seeds don't tell B from A. {told}"
    return f"{method}: {told}"


def comparison_page(a: Results, b: Results, names: tuple[str, str], margin: float | None = None) -> str:
    """Compose the page.

    Args:
        a, b: what `read_results` returns.
        names: what readers know the runs by.
        margin: in percentage points; if given, the runs are tested for being equal but for it.

    Raises:
        ValueError: see `common_runs`.
    """
    tables = [
        TextTable(comparison_rows(a, b), COMPARISON_CAPTION),
        TextTable(task_comparison_rows(a, b), TASKS_CAPTION),
    ]
    if margin is not None:
        tables.append(TextTable(equivalence_comparison_rows(a, b, margin), EQUIVALENCE_CAPTION))
    differs = what_differs(a, b)
    return page(
        f"Two runs of {len(a['tasks'])} tasks",
        f"A: {names[0]}. B: {names[1]}. {RULE}",
        [
            Section("Summary", [Words(comparison_words(a, b))]),
            Section("Differences", tables),
            Section("What the runs differ in", [TextTable(differs, text=True) if len(differs) > 1 else ALIKE]),
        ],
    )


def write_comparison(
    a: Results, b: Results, names: tuple[str, str], folder: Path, margin: float | None = None
) -> Path:
    """Write `comparison.html`, whole or not at all; see `comparison_page`."""
    html = comparison_page(a, b, names, margin)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / PAGE) as partial:
        partial.write_text(html)
    return folder / PAGE


def _at_end(results: Results, run: dict[str, Any], task: str) -> float:
    return run["matrix"][-1][results["tasks"].index(task)]


def _seeds(results: Results) -> dict[str, list[int]]:
    return {method: [run["seed"] for run in runs] for method, runs in results["methods"].items()}
