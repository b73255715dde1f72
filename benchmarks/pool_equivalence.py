"""Does the expert pool reach one LoRA per task? Streams with fresh seeds, each with an order of its own, and what they come to.

    python benchmarks/pool_equivalence.py --seeds 100 101 102 103 104 105 --output_dir runs/pool [-- --suite <folder> ...]

Every seed is a run of `examples/mtil.py` in a folder of its own, with the tasks in the order that the seed draws, so an
interrupted study goes on where it was. Arguments after `--` go to the example. Margin and settings were fixed before these
seeds were run; the shape of the pool and its rate come from benchmarks/learning_rates.py, on held-out training images.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from peft_moe_merge.mtil.results import METRICS, read_results
from peft_moe_merge.report.statistics import equivalence, estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import difference, spread

EXAMPLE = Path(__file__).parents[1] / "examples" / "mtil.py"


def run(seed: int, options: argparse.Namespace, further: list[str]) -> Path:
    """Run one seed, or what is left of it, and return its results."""
    folder = Path(options.output_dir, f"seed_{seed}")
    results = folder / "results.json"
    arguments = ["--methods", *options.methods, "--seeds", str(seed), "--order", "random", "--order_seed", str(seed)]
    arguments += ["--steps", "60", "--batch_size", "32", "--lr", "2e-2", "--num_experts", "20", "--merge_every", "20"]
    arguments += ["--cpu", "--output_dir", str(folder), *(["--resume"] if folder.exists() else []), *further]
    subprocess.run([sys.executable, str(EXAMPLE), *arguments], check=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104, 105])
    parser.add_argument("--methods", nargs="+", default=["zero_shot", "lora_per_task", "moe_lora_pool"])
    parser.add_argument("--output_dir", default="runs/pool")
    parser.add_argument("--margin", type=float, default=2.0, help="of Last, in points, that do not matter")
    parser.add_argument("--only_show", action="store_true", help="of the runs that are there")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, further = parser.parse_args(arguments[:at]), arguments[at + 1 :]

    runs: dict[str, list[dict]] = {}
    for seed in options.seeds:
        path = Path(options.output_dir, f"seed_{seed}", "results.json")
        if not options.only_show:
            run(seed, options, further)
        if path.exists():
            for method, of_seed in read_results(path)["methods"].items():
                runs.setdefault(method, []).extend(of_seed)

    table = Table(title="Means over seeds, in %, ± Student's 95 % interval")
    for column in ("method", "seeds", *map(str.capitalize, METRICS)):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method, known in runs.items():
        table.add_row(method, str(len(known)), *(spread(over_seeds(known, metric), 2) for metric in METRICS))
    console = Console(width=120)
    console.print(table)
    for other in runs:
        if other == "moe_lora_pool" or "moe_lora_pool" not in runs:
            continue
        for metric in ("transfer", "average", "last"):
            differences = paired_differences(runs["moe_lora_pool"], runs[other], metric)
            console.print(f"{metric}, moe_lora_pool - {other}: {difference(estimate(differences))}", highlight=False)
        verdict = equivalence(paired_differences(runs["moe_lora_pool"], runs[other], "last"), options.margin)
        if other == "lora_per_task" and verdict.p_value is not None:
            console.print(
                f"last, equivalent within {options.margin:g} points: {'yes' if verdict.holds else 'not shown'}, "
                f"p = {verdict.p_value:.4f}, 90 % interval [{verdict.low:+.2f}, {verdict.high:+.2f}]",
                highlight=False,
            )


if __name__ == "__main__":
    main()
