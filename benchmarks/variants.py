"""How the studies of variants run: each variant learns the embedded benchmark in a folder of its own, seed by seed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods.base import Method
from peft_moe_merge.mtil.results import add_run, empty_results, run_result, write_results
from peft_moe_merge.mtil.stream import StreamSettings, run_stream


def folder_name(variant: str) -> str:
    """Name a variant's files: its words, joined."""
    return variant.replace(",", "").replace(":", "").replace("'", "").replace(" ", "_")


def run_variants(
    variants: Mapping[str, Callable[[], Method]], training: StreamSettings, seeds: Sequence[int], output_dir: Path
) -> dict[str, Any]:
    """Run every variant with every seed, or what is left of it, and write `results.json` after each run.

    Args:
        variants: what makes the method of each, by its name.
        training: of all.
        seeds: one run each.
        output_dir: of the study.

    Returns:
        The results, with the variants' names in the place of methods.
    """
    accelerator = Accelerator()
    tasks = load_suite("mini")
    results = empty_results("mini", [task.name for task in tasks], {"seeds": seeds, **vars(training)})
    for seed in seeds:
        for name, build in variants.items():
            print(f"seed {seed}, {name}", flush=True)
            folder = output_dir / folder_name(name) / f"seed_{seed}"
            progress = run_stream(tasks, build, training, folder, accelerator, seed=seed, resume=True)
            add_run(results, name, run_result(seed, progress))
            write_results(output_dir / "results.json", results)
    return results
