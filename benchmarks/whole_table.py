"""Every method on fresh seeds, each with an order of tasks of its own: the runs, and what they come to.

    python benchmarks/whole_table.py --seeds 100 101 102 103 104 105 --output_dir runs/table [-- --suite <folder> ...]
    python benchmarks/whole_table.py --only_show --keep docs/results/mini --markdown      # from the files kept there

    python benchmarks/whole_table.py --only_show --keep docs/results/mini --add runs/unknown  # and those of another study

Every seed is a run of `examples/mtil.py` in a folder of its own, with the tasks in the order that the seed draws, so an
interrupted study goes on where it was; other methods may be run later, in another folder. Arguments after `--` go to the
example. `--keep` puts what the tables need of all runs into a folder, a compressed file per seed, beside what is kept there.

Margin and settings were fixed before these seeds were run; rates, and the shape of the pool, come from
benchmarks/learning_rates.py, on held-out training images.
"""

import argparse
import gzip
import json
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from peft_moe_merge.files import whole
from peft_moe_merge.mtil.methods import METHODS
from peft_moe_merge.mtil.report.tables import x_tail_rows
from peft_moe_merge.mtil.results import METRICS, add_run, read_results
from peft_moe_merge.report.plots import GREY, STYLE, look
from peft_moe_merge.report.statistics import (
    equivalence,
    estimate,
    holm,
    over_seeds,
    paired_differences,
    paired_p_value,
)
from peft_moe_merge.report.tables import Rows, difference, markdown, number, print_table, spread, terminal

EXAMPLE = Path(__file__).parents[1] / "examples" / "mtil.py"
OURS, CEILING = ("moe_lora_pool", "moe_lora_warm", "moe_lora_fused"), "lora_per_task"
PRIMARY = ("average", "last")
SEEDS = [100, 101, 102, 103, 104, 105]
KEPT = ("seed", "matrix", "seconds", "trainable_parameters", "stored_bytes", "x_tail")


def run(seed: int, options: argparse.Namespace, further: list[str]) -> Path:
    """Run one seed, or what is left of it, and return its results."""
    folder = Path(options.output_dir, f"seed_{seed}")
    arguments = ["--methods", *options.methods, "--seeds", str(seed), "--order", "random", "--order_seed", str(seed)]
    arguments += ["--steps", "60", "--batch_size", "32", "--lr", "2e-2", "--num_experts", "20", "--merge_every", "20"]
    arguments += ["--cpu", "--output_dir", str(folder), *(["--resume"] if folder.exists() else []), *further]
    subprocess.run([sys.executable, str(EXAMPLE), *arguments], check=True)
    return folder / "results.json"


def keep(results: dict[str, Any], folder: Path, seed: int) -> None:
    """Put a seed's runs, slim, beside those kept of it already."""
    file = folder / f"seed_{seed}.json.gz"
    kept = (
        json.loads(gzip.decompress(file.read_bytes()))
        if file.exists()
        else {"suite": Path(results["suite"]).name, "tasks": results["tasks"], "methods": {}}
    )
    if kept["tasks"] != results["tasks"]:
        raise SystemExit(
            f"{file} is of the tasks {kept['tasks']}, not {results['tasks']}: keep them in another folder."
        )
    for method, runs in results["methods"].items():
        for one in runs:
            add_run(kept, method, {key: one[key] for key in KEPT if key in one})
    folder.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:  # without a time in it, so that the same runs give the same bytes
        partial.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0))


def kept_runs(folder: Path, seeds: Collection[int] | None = None) -> dict[str, list[dict]]:
    """Read what is kept, of some seeds or all: the runs of each method, the one that ends best first."""
    found: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("seed_*.json.gz")):
        if seeds is None or int(file.name.removeprefix("seed_").partition(".")[0]) in seeds:
            for method, runs in read_results(file)["methods"].items():
                found.setdefault(method, []).extend(runs)
    if not found:
        of_seeds = "" if seeds is None else f" of the seeds {sorted(seeds)}"
        raise SystemExit(f"There is no seed_*.json.gz{of_seeds} in {str(folder)!r}: run without --only_show first.")
    return dict(sorted(found.items(), key=lambda item: -over_seeds(item[1], "last").mean))


def tables(runs: dict[str, list[dict]], margin: float) -> Iterator[tuple[str, Rows, str]]:
    """Yield the tables, each with a title and a caption."""
    rows = [["method", "seeds", *map(str.capitalize, METRICS)]]
    for method, known in runs.items():
        rows.append([method, str(len(known)), *(spread(over_seeds(known, metric), 2) for metric in METRICS)])
    yield "Accuracies in %", rows, "Means over seeds, ± Student's 95 % interval. Each seed has an order of its own."

    for ours in (name for name in OURS if name in runs):
        rows = [["method", *(f"Δ {metric.capitalize()}" for metric in PRIMARY), "Holm p, Average", "Holm p, Last"]]
        others = [method for method in runs if method != ours]
        found = {
            (method, metric): paired_differences(runs[ours], runs[method], metric)
            for method in others
            for metric in PRIMARY
        }
        tested = {key: p for key, values in found.items() if (p := paired_p_value(values)) is not None}
        adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
        for method in others:
            keys = [(method, metric) for metric in PRIMARY]
            told = [difference(estimate(found[key])) for key in keys]
            rows.append([method, *told, *(number(adjusted.get(key), 4) for key in keys)])
        caption = f"Of {len(tested)} paired t tests, adjusted by Holm: what holds of all at once."
        yield f"{ours} minus the others", rows, caption

    rows = [["Last", "margin", "equivalent", "p", "90 % interval"]]
    for ours in (name for name in OURS if name in runs and CEILING in runs):
        verdict = equivalence(paired_differences(runs[ours], runs[CEILING], "last"), margin)
        if verdict.p_value is not None:
            told = ["yes" if verdict.holds else "not shown", f"{verdict.p_value:.4f}"]
            interval = f"[{verdict.low:+.2f}, {verdict.high:+.2f}]"
            rows.append([f"{ours} - {CEILING}", f"{margin:g}", *told, interval])
    if len(rows) > 1:
        yield "Two one-sided tests", rows, "The margin was fixed beforehand."

    if rows := x_tail_rows({"methods": runs}):
        yield (
            "X-TAIL",
            rows,
            "All classes of all tasks are candidates, and nobody names the task. Seeds that were run so.",
        )

    rows = [["method", "trained at once", "stored, MB", "Last per MB stored", "seconds"]]
    for method, known in runs.items():
        stored, last = over_seeds(known, "stored_bytes").mean, over_seeds(known, "last").mean
        trained = over_seeds(known, "trainable_parameters").mean
        rows.append(
            [
                method,
                "-" if trained is None else f"{trained:,.0f}",
                number(stored and stored / 1e6, 1),
                number(last / (stored / 1e6) if stored else None, 1),
                number(over_seeds(known, "seconds").mean, 0),
            ]
        )
    yield (
        "What it takes",
        rows,
        "Stored: the last checkpoint, beside the CLIP. Seconds: of a busy machine, an order of magnitude.",
    )


def scatter(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw what each method keeps of what CLIP could do, Transfer, beside what it has learnt in the end, Last."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        axes = figure.subplots()
        for position, (method, known) in enumerate(runs.items()):
            across, up = (over_seeds(known, metric) for metric in ("transfer", "last"))
            bars = {"xerr": across.half, "yerr": up.half, "elinewidth": 0.6, "capsize": 2}
            axes.errorbar(across.mean, up.mean, linestyle="none", label=method, **look(position), **bars)
        if "zero_shot" in runs:
            axes.axvline(over_seeds(runs["zero_shot"], "transfer").mean, color=GREY, linewidth=0.6, linestyle=":")
        axes.set_xlabel("Transfer, %")
        axes.set_ylabel("Last, %")
        figure.legend(loc="outside right center", frameon=False)
        with whole(path) as partial:
            figure.savefig(partial, dpi=130, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {SEEDS}; with --only_show, all that are kept")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output_dir", default="runs/table")
    parser.add_argument(
        "--keep", type=Path, help="where what the tables need of all runs is kept, default: OUTPUT_DIR/kept"
    )
    parser.add_argument(
        "--add",
        type=Path,
        nargs="+",
        default=[],
        help="folders of seed_*/results.json of other studies, to be kept too",
    )
    parser.add_argument("--figure", type=Path, help="draw Transfer beside Last, a PNG")
    parser.add_argument("--margin", type=float, default=2.0, help="of Last, in points, that do not matter")
    parser.add_argument("--only_show", action="store_true", help="what is kept, without running anything")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, further = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    folder = options.keep or Path(options.output_dir, "kept")

    for seed in () if options.only_show else options.seeds or SEEDS:
        keep(read_results(run(seed, options, further)), folder, seed)
    for file in sorted(file for other in options.add for file in other.glob("seed_*/results.json")):
        keep(read_results(file), folder, int(file.parent.name.removeprefix("seed_")))
    runs = kept_runs(folder, options.seeds if options.only_show else None)
    if options.figure:
        scatter(runs, options.figure)
    console = terminal()
    for title, rows, caption in tables(runs, options.margin):
        if options.markdown:
            print(f"**{title}**\n\n{markdown(rows)}\n\n{caption}\n")
        else:
            print_table(console, rows, title, caption)


if __name__ == "__main__":
    main()
