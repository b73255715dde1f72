"""What merging does, and what of it: the merging cycle, the pair, the union, the router's column, the number of experts.

    python benchmarks/merging_ablation.py --seeds 0 1 2 [--output_dir runs/merging_ablation]

Every variant learns the embedded benchmark's 11 tasks and differs in one thing from the paper's rule; each is set against the
same mixture without merging, with the same number of experts and the same seeds. An interrupted study goes on where it was.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from variants import run_variants

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.base import Method
from peft_moe_merge.mtil.stream import StreamSettings
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


def build(method: type[Method], settings: Any) -> Method:
    """Make a variant's method."""
    return method(*load_clip(mini_clip_path()), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/merging_ablation"))
    options = parser.parse_args()

    variants: dict[str, Callable[[], Method]] = {}
    for experts, changes in VARIANTS.items():
        for variant, changed in {WITHOUT: None, **changes}.items():
            method = METHODS["moe_adapters" if changed is None else "moe_lora_merge"]
            settings = MethodSettings(num_experts=experts, **{"merge_every": CYCLE, **(changed or {})})
            variants[f"{experts}: {variant}"] = partial(build, method, settings)
    results = run_variants(variants, STREAM, options.seeds, options.output_dir)
    print_study(results)


if __name__ == "__main__":
    main()
