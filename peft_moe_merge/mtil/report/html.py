"""The results of a stream as one page, with their pictures beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_moe_merge.report.page import Fold, Picture, Section, TextTable, Words, page, picture, write_report_files
from peft_moe_merge.report.statistics import RULE

from .anchors import anchor_notes
from .change_maps import CHANGES_NOTE, FORGETTING_NOTE, change_maps
from .pictures import draw_all
from .summary import summary
from .tables import (
    BASELINE,
    COMPARED,
    DIFFERENCE_CAPTION,
    EQUIVALENCE_CAPTION,
    SELECTION_CAPTION,
    X_TAIL_CAPTION,
    difference_rows,
    equivalence_rows,
    matrix_rows,
    selected_rows,
    selection_rows,
    summary_caption,
    summary_rows,
    task_rows,
    x_tail_rows,
)

METRICS_CAPTION = (
    "Transfer: accuracy on a task before it is learnt; Average: over the stream; Last: at its end; Forgetting: what is lost of "
    "the best."
)
SECTIONS = {  # of pictures, by the first word of their names
    "metrics": "Transfer, Average, Last",
    "x_tail": "X-TAIL: Transfer, Average, Last",
    "plasticity": "What is learnt",
    "accuracy": "Accuracy after each task",
    "selection": "Which task is an image from?",
    "frozen": "Frozen experts",
    "usage": "Which experts a task uses",
    "merges": "Merges",
    "selected": "Experts selected over training",
    "activations": "Experts before and after merging",
    "growth": "What a task adds",
    "losses": "Training loss",
}


def write_report(
    results: dict[str, Any], folder: Path, baseline: str = BASELINE, margin: float | None = None
) -> list[Path]:
    """Write `report.html`, and its pictures also as `figures/*.png`. Each file appears complete or not at all.

    Args:
        results: what `read_results` returns.
        folder: where to write.
        baseline: the method that the others are compared with, seed by seed.
        margin: in percentage points; if given, methods are tested for being equal to the baseline but for it.

    Returns:
        The files written, the page last.
    """
    pictures = [picture(name, *drawn) for name, drawn in draw_all(results).items()]
    html = report_page(results, pictures, baseline, margin)
    return write_report_files(folder, "report.html", html, pictures, pictures_in="figures")


def report_page(
    results: dict[str, Any], pictures: list[Picture], baseline: str = BASELINE, margin: float | None = None
) -> str:
    """Compose the page from the results and their pictures."""
    tasks = results["tasks"]
    words = summary(results)
    numbers = [TextTable(summary_rows(results), f"{summary_caption()} {METRICS_CAPTION}")]
    if rows := difference_rows(results, baseline):
        numbers.append(TextTable(rows, DIFFERENCE_CAPTION))
        if margin is not None:
            numbers.append(TextTable(equivalence_rows(results, margin, baseline), EQUIVALENCE_CAPTION))
    elif len(results["methods"]) > 1:
        numbers.append(f"{baseline} was not run, so there is no difference to it.")
    selection = []
    if rows := selection_rows(results):
        title = "Right task chosen when all are learnt, percent"
        selection = [TextTable(rows, SELECTION_CAPTION), TextTable(selected_rows(results), title=title)]
    drawn = [
        Section(heading, [one for one in pictures if one.name == kind or one.name.startswith(f"{kind}_")])
        for kind, heading in SECTIONS.items()
    ]
    per_task = [TextTable(task_rows(results, metric), title=metric.capitalize()) for metric in COMPARED]
    maps = change_maps(results)
    matrices = [
        Fold(f"{name}: accuracy matrix", [TextTable(matrix_rows(tasks, runs[0]))])
        for name, runs in results["methods"].items()
        if len(runs) == 1
    ]
    return page(
        f"Learning {len(tasks)} tasks in sequence: suite {results['suite']}",
        f"Tasks in order: {', '.join(tasks)}.",
        [
            Section("Summary", [Words(words)] if words else []),
            Section("Methods", numbers),
            Section("What changed", [CHANGES_NOTE, FORGETTING_NOTE, *maps] if maps else []),
            Section("Choosing the task", selection),
            Section("X-TAIL", [TextTable(rows, X_TAIL_CAPTION)] if (rows := x_tail_rows(results)) else []),
            *drawn,
            Section("Per task", [*per_task, f"Percent. {RULE}", *anchor_notes(results), *matrices]),
            *(_facts(results, heading) for heading in ("settings", "versions")),
        ],
    )


def _facts(results: dict[str, Any], heading: str) -> Section:
    facts = results.get(heading) or {}
    rows = [[heading.removesuffix("s"), "value"], *([name, str(value)] for name, value in facts.items())]
    return Section(heading.capitalize(), [TextTable(rows, text=True)] if facts else [])
