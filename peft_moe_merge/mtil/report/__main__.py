"""Redo tables, pictures and page from an existing run: `python -m peft_moe_merge.mtil.report runs/mtil`.

Two runs are compared, method by method and seed by seed, on a page of its own: `... runs/before runs/after`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_moe_merge.report.tables import print_table, terminal

from ..results import read_results
from .compare import (
    COMPARISON_CAPTION,
    comparison_rows,
    comparison_words,
    equivalence_comparison_rows,
    what_differs,
    write_comparison,
)
from .html import write_report
from .tables import BASELINE, EQUIVALENCE_CAPTION, print_results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_moe_merge.mtil.report", description=__doc__)
    parser.add_argument(
        "results", type=Path, nargs="+", help="the results.json of a run, or its folder; two to compare"
    )
    parser.add_argument("--baseline", help=f"the method to compare with, seed by seed; default: {BASELINE}")
    parser.add_argument(
        "--margin",
        type=float,
        help="test, by two one-sided t tests, what is equal up to so many points: methods to the baseline, or two runs",
    )
    parser.add_argument("--output_dir", type=Path, help="where the report goes; default: beside the (second) results")
    arguments = parser.parse_args()
    if len(arguments.results) > 2:
        parser.error(f"one run has a report, two are compared; got {len(arguments.results)}.")
    if arguments.margin is not None and not arguments.margin > 0:
        parser.error(f"--margin {arguments.margin} must be positive.")
    if len(arguments.results) == 2 and arguments.baseline:
        parser.error("--baseline is for methods of one run; two runs are compared method by method.")
    files = [path / "results.json" if path.is_dir() else path for path in arguments.results]
    output_dir = arguments.output_dir or files[-1].parent
    try:
        runs = [read_results(file) for file in files]
        if len(runs) == 2:
            compare(runs, tuple(str(path) for path in arguments.results), output_dir, arguments.margin)
            return
    except (OSError, ValueError) as error:
        parser.error(str(error))
    baseline = arguments.baseline or BASELINE
    print_results(runs[0], baseline=baseline, margin=arguments.margin)
    for file in write_report(runs[0], output_dir, baseline, arguments.margin):
        print(f"written: {file}")


def compare(runs: list[dict[str, Any]], names: tuple[str, str], output_dir: Path, margin: float | None) -> None:
    """Print how two runs compare, and write the page."""
    console = terminal()
    print_table(console, comparison_rows(*runs), f"B: {names[1]}, against A: {names[0]}", COMPARISON_CAPTION)
    if margin is not None:
        print_table(console, equivalence_comparison_rows(*runs, margin), "Equal?", EQUIVALENCE_CAPTION)
    if len(rows := what_differs(*runs)) > 1:
        print_table(console, rows, "What they differ in")
    for sentence in comparison_words(*runs):
        print(sentence)
    print(f"written: {write_comparison(*runs, names, output_dir, margin)}")


if __name__ == "__main__":
    main()
