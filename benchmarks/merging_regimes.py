"""Where does merging pay? Bounded pools in five regimes, each beside its controls.

    python benchmarks/merging_regimes.py --seeds 100 101 102 --output_dir runs/regimes
    python benchmarks/merging_regimes.py --only_show --output_dir runs/regimes --markdown

- pools: the 11 tasks of `mini` in a pool of 6 or 12 experts, where 22 would be needed (30 steps of 32 images).
- few: 20 related tasks, parts of four of mini's, 5 images a class, in a pool of 10 where 40 would be needed (20 steps of 16).
- many: 50 tasks of two or three classes in a pool of 25 where 100 would be needed (10 steps of 16).
- similar, dissimilar: the same 64 classes in 8 tasks of classes whose names are alike, or unlike, in a pool of 6 where 16 would be
  needed (30 steps of 32).

A full pool merges the two most alike experts of old tasks to make room; both tasks' routers then point to the union. Controls,
one thing changed at a time: a random pair; one of the two kept in place of a union; the mean of factors in place of the best
low-rank sum; as many bytes without merging, in experts of a smaller rank; as many slots without merging, one expert a task,
where there are enough; and a pool without a bound, which shows what there is to lose. With and without a bound also at a
quarter of the rate: where so few steps learn too fast, a union can look good for being an average. Not among them: a union
without redirected routers, which leaves old tasks without experts; what that does is the published form, in docs/merging.md.

Every seed has an order of its own, the same for all variants. Each run is a file, so an interrupted study goes on where it was.
*Just learnt* is the accuracy right after a task's training, *Last* that after the last task; *merged* is the share of the
choices, over tasks and layers, that lead to an expert which several tasks share, at the end.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from variants import folder_name

from peft_moe_merge.files import whole
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods.moe_lora_pool import MoELoraPool, PoolSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings
from peft_moe_merge.report.statistics import estimate, over_seeds, paired_differences
from peft_moe_merge.report.tables import Rows, difference, markdown, print_table, spread, terminal

FREE = "no bound"
SLOW = {"pool_lr": 2.5e-3}


def bounded(experts: int, needed: int) -> dict[str, dict[str, Any]]:
    """Name the variants of a pool that holds fewer experts than there are needed."""
    bound = {"max_experts": experts}
    return {
        FREE: {},
        f"{FREE}, slow": SLOW,
        f"{experts}: merged": bound,
        f"{experts}: merged, slow": {**bound, **SLOW},
        f"{experts}: random pair": {**bound, "pool_pair": "random"},
        f"{experts}: one of two kept": {**bound, "pool_strategy": "keep_used"},
        f"{experts}: mean of factors": {**bound, "pool_strategy": "average"},
        f"{experts}: same bytes, smaller rank": {"pool_r": max(1, 8 * experts // needed)},
    }


ONE_EACH = {"12: same slots, one each": {"experts_per_task": 1, "max_experts": 12}}
REGIMES: dict[str, tuple[StreamSettings, dict[str, dict[str, Any]]]] = {
    "pools": (
        StreamSettings(steps=30, batch_size=32, lr=[1e-2]),
        {**bounded(6, 22), **bounded(12, 22), **ONE_EACH},
    ),
    "few": (StreamSettings(steps=20, batch_size=16, lr=[1e-2]), bounded(10, 40)),
    "many": (StreamSettings(steps=10, batch_size=16, lr=[1e-2]), bounded(25, 100)),
    "similar": (StreamSettings(steps=30, batch_size=32, lr=[1e-2]), bounded(6, 16)),
    "dissimilar": (StreamSettings(steps=30, batch_size=32, lr=[1e-2]), bounded(6, 16)),
}
SUITE = {"pools": "mini", "similar": "mini_similar", "dissimilar": "mini_dissimilar"}
RELATED = ("animals", "flowers", "food", "vehicles")


def tasks_of(regime: str, seed: int) -> list[Task]:
    """Load the tasks of a regime in the order of a seed."""
    few_shot = 5 if regime == "few" else None
    tasks = load_suite(SUITE.get(regime, "mini_parts"), few_shot=few_shot, seed=seed, order="random", progress=False)
    if regime == "few":
        of_each = {name: [task for task in tasks if task.name.startswith(name)][:5] for name in RELATED}
        tasks = [task for task in tasks if any(task in some for some in of_each.values())]
    return tasks[:50]


def merged_share(method: MoELoraPool) -> float:
    """Tell which share of tasks' choices, in percent, leads to experts that several share."""
    shared = total = 0
    for routers in method.model.router_banks().values():
        chosen = np.concatenate([np.asarray(experts) for experts in routers.columns.lists])
        known = np.bincount(np.concatenate([np.unique(experts) for experts in routers.columns.lists]))
        shared, total = shared + (known[chosen] > 1).sum(), total + len(chosen)
    return 100 * float(shared / total)


def learn(regime: str, variant: str, seed: int, accelerator: Accelerator) -> dict[str, Any]:
    """Let a pool learn the tasks of a regime."""
    training, variants = REGIMES[regime]
    stream = Stream(tasks_of(regime, seed), training, accelerator)
    set_seed(seed)
    method = MoELoraPool(*load_clip(mini_clip_path()), PoolSettings(**variants[variant]))
    learnt = []
    for position, task in enumerate(stream.tasks):
        set_seed(seed + 1000 * position)
        stream.train(method, position, seed + 1000 * position, Progress({}))
        learnt.append(stream.accuracy(method, task))
    last = [stream.accuracy(method, task) for task in stream.tasks]
    means = {"just_learnt": float(np.mean(learnt)), "last": float(np.mean(last))}
    return {"seed": seed, **means, "merged": merged_share(method), "learnt": learnt, "after": last}


def rows_of(regime: str, runs: dict[str, list[dict]]) -> Rows:
    """Make the table of a regime: each variant beside the pool that merges, of the same size."""
    rows = [["variant", "seeds", "just learnt", "Last", "Δ Last to merged", "merged"]]
    for variant in REGIMES[regime][1]:
        known = runs.get(variant, [])
        ours = variant if variant.startswith(FREE) else f"{variant.partition(':')[0]}: merged"
        of_known = [spread(over_seeds(known, name)) for name in ("just_learnt", "last")]
        delta = difference(estimate(paired_differences(known, runs.get(ours, []), "last"))) if variant != ours else ""
        rows.append([variant, str(len(known)), *of_known, delta, spread(over_seeds(known, "merged"))])
    return rows


def kept(folder: Path) -> Iterator[tuple[str, str, dict]]:
    """Read what there is."""
    for regime, (_, variants) in REGIMES.items():
        for variant in variants:
            for file in sorted(folder.glob(f"{name_of(regime, variant)}_[0-9]*.json")):
                yield regime, variant, json.loads(file.read_text())


def name_of(regime: str, variant: str) -> str:
    """Name the files of a regime's variant."""
    return folder_name(f"{regime}_{variant}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=list(REGIMES))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/regimes"))
    parser.add_argument("--only_show", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    asked = [
        (seed, regime, variant)
        for seed in options.seeds
        for regime in options.regimes
        for variant in REGIMES[regime][1]
    ]
    for seed, regime, variant in tqdm([] if options.only_show else asked, desc="runs"):
        file = options.output_dir / f"{name_of(regime, variant)}_{seed}.json"
        if not file.exists():
            told = learn(regime, variant, seed, accelerator)
            options.output_dir.mkdir(parents=True, exist_ok=True)
            with whole(file) as partial:
                partial.write_text(json.dumps(told))
    runs: dict[str, dict[str, list[dict]]] = {}
    for regime, variant, told in kept(options.output_dir):
        runs.setdefault(regime, {}).setdefault(variant, []).append(told)
    console = terminal()
    for regime, of_variants in runs.items():
        rows = rows_of(regime, of_variants)
        if options.markdown:
            print(f"**{regime}**\n\n{markdown(rows)}\n")
        else:
            print_table(console, rows, regime, "Percent, means over seeds, ± Student's 95 % interval.")


if __name__ == "__main__":
    main()
