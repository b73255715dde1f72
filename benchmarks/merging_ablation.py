"""What merging does, and what of it: the merging cycle, the pair, the union, the router's column, the number of experts.

    python benchmarks/merging_ablation.py --seeds 0 1 2 [--output_dir runs/merging_ablation]

Every variant learns the embedded benchmark's 11 tasks and differs in one thing from the paper's rule; each is set against the
same mixture without merging, with the same number of experts and the same seeds. An interrupted study goes on where it was.
"""

import argparse
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.results import add_run, empty_results, run_result, write_results
from peft_moe_merge.mtil.stream import StreamSettings, run_stream
from peft_moe_merge.report.statistics import RULE, estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import difference, spread

EXPERTS, CYCLE = 20, 20
STREAM = StreamSettings(steps=60, batch_size=32, lr=[2e-2])
WITHOUT = "no merging"
VARIANTS: dict[int, dict[str, dict[str, Any]]] = {
    EXPERTS: {
        "the paper's rule": {},
        "every 5 steps": {"merge_every": 5},
        "every 10 steps": {"merge_every": 10},
        "every 30 steps": {"merge_every": 30},
        "most similar pair": {"merge_pair": "most_similar"},
        "aligned union": {"merge_strategy": "aligned"},
        "mean router column": {"merge_routing": "mean"},
        "aligned union, mean router column": {"merge_strategy": "aligned", "merge_routing": "mean"},
    },
    10: {"the paper's rule": {}},
    55: {"the paper's rule": {}},
}


def merged_share(run: dict[str, Any]) -> float | None:
    """Tell which share of a run's selections, in percent, went to experts that a merge had made in the same task.

    Counts are of the whole task, so an expert's few selections before its merge are among them; a merge at the last step is
    left out, since nothing can select what it made. None for a run that never merged in time.
    """
    merged = total = 0
    for merges, usage, losses in zip(run["merges"], run["usage"], run["losses"], strict=True):
        made = {(block, merge[0]) for step, blocks in merges if step < len(losses) for block, merge in blocks.items()}
        merged += sum(usage[block][expert] for block, expert in made)
        total += sum(map(sum, usage.values()))
    return 100 * merged / total if merged else None


def print_study(results: dict[str, Any]) -> None:
    """Print a row per variant: accuracies, and paired differences to the same mixture without merging."""
    table = Table(
        title="Merging, one thing varied at a time",
        caption=f"Percent, means over seeds. {RULE} Δ: paired difference to no merging with the same number of experts. "
        "Merged: share of selections that went to merged experts.",
    )
    columns = ("experts", "variant", "seeds", "Average", "Δ Average", "Last", "Δ Last", "forgetting", "merged")
    for column in columns:
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, runs in results["methods"].items():
        experts, variant = name.split(": ")
        row = [experts, variant, str(len(runs))]
        for metric in ("average", "last"):
            baseline = results["methods"].get(f"{experts}: {WITHOUT}", [])
            row.append(spread(over_seeds(runs, metric), 2))
            row.append("" if variant == WITHOUT else difference(estimate(paired_differences(runs, baseline, metric))))
        row += [spread(over_seeds(runs, "forgetting"), 2), spread(estimate([merged_share(run) for run in runs]))]
        table.add_row(*row, end_section=variant == list(VARIANTS[int(experts)])[-1])
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/merging_ablation"))
    options = parser.parse_args()

    accelerator = Accelerator()
    tasks = load_suite("mini")
    results = empty_results("mini", [task.name for task in tasks], {"seeds": options.seeds, **vars(STREAM)})
    for seed in options.seeds:
        for experts, variants in VARIANTS.items():
            for variant, changed in {WITHOUT: None, **variants}.items():
                method = METHODS["moe_adapters" if changed is None else "moe_lora_merge"]
                settings = MethodSettings(num_experts=experts, **{"merge_every": CYCLE, **(changed or {})})
                folder = f"{experts} {variant}".replace(",", "").replace("'", "").replace(" ", "_")
                print(f"seed {seed}, {experts} experts, {variant}", flush=True)
                progress = run_stream(
                    tasks,
                    lambda method=method, settings=settings: method(*load_clip(mini_clip_path()), settings),
                    STREAM,
                    options.output_dir / folder / f"seed_{seed}",
                    accelerator,
                    seed=seed,
                    resume=True,
                )
                add_run(results, f"{experts}: {variant}", run_result(seed, progress))
                write_results(options.output_dir / "results.json", results)
    print_study(results)


if __name__ == "__main__":
    main()
