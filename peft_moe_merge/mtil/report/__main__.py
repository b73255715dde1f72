"""Redo tables, pictures and page from an existing file: `python -m peft_moe_merge.mtil.report results.json`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..results import read_results
from .html import write_report
from .tables import BASELINE, print_results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_moe_merge.mtil.report", description=__doc__)
    parser.add_argument("results", type=Path, help="the results.json of a run")
    parser.add_argument("--baseline", default=BASELINE, help="the method to compare with, seed by seed")
    parser.add_argument(
        "--margin",
        type=float,
        help="test, by two one-sided t tests, which methods equal the baseline up to so many points",
    )
    parser.add_argument("--output_dir", type=Path, help="where the report goes; default: beside the results")
    arguments = parser.parse_args()
    try:
        results = read_results(arguments.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if arguments.margin is not None and not arguments.margin > 0:
        parser.error(f"--margin {arguments.margin} must be positive.")
    output_dir = arguments.output_dir or arguments.results.parent
    print_results(results, baseline=arguments.baseline, margin=arguments.margin)
    for file in write_report(results, output_dir, arguments.baseline, arguments.margin):
        print(f"written: {file}")


if __name__ == "__main__":
    main()
