"""Reproduce the theory of mixture-of-experts in continual learning: claims, figures and one HTML page.

    python examples/theory.py --output_dir runs/theory

takes about a minute on two cores and needs no network.
"""

import argparse
import warnings
from pathlib import Path

from peft_moe_merge.report.statistics import RULE
from peft_moe_merge.report.tables import print_table, terminal
from peft_moe_merge.theory.page import final_table, write_study
from peft_moe_merge.theory.simulate import Setting
from peft_moe_merge.theory.study import ENSEMBLE, run_study


def main() -> None:
    """Parse the arguments, run the study, print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/theory"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seeds", type=int, default=20, help="number of seeds, from 0 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1000, help="rounds of each run (default: %(default)s)")
    parser.add_argument(
        "--signals",
        choices=("cluster", "task"),
        default="cluster",
        help="tasks of a cluster share a signal, or each has its own (default: %(default)s)",
    )
    parser.add_argument(
        "--ensemble", type=int, default=ENSEMBLE, help="seeds that check the closed forms (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.out is not None:
        warnings.warn("`--out` is now `--output_dir`.", FutureWarning, stacklevel=1)
        args.output_dir = args.out
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file: name a folder.")
    try:
        study = run_study(Setting(rounds=args.rounds, signals=args.signals), range(args.seeds), ensemble=args.ensemble)
    except ValueError as error:
        parser.error(str(error))
    claims = write_study(study, args.output_dir)

    print()
    print_table(terminal(), final_table(study), "Forgetting and error", RULE)
    for claim in claims:
        print(f"\n{claim.name}: {claim.verdict}. {claim.statement}")
        for criterion in claim.criteria:
            print(f"  {'yes' if criterion.holds else 'NO ':<4}{criterion.asked}: {criterion.measured}")
    print(f"\nPictures, numbers and page: {args.output_dir / 'index.html'}")


if __name__ == "__main__":
    main()
