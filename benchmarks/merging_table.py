r"""WEMoE and its relatives against every static merge: which wins, with how many tasks, on which.

    python benchmarks/merging_table.py --output_dir runs/merging                # the embedded benchmark, three seeds
    python benchmarks/merging_table.py --output_dir runs/merging --only_show    # tables, pictures and page of what is there
    python benchmarks/merging_table.py --output_dir runs/longer --rates runs/merging/rates/rates.json --adapt_steps 240 \
        --methods individual tsv adamerging_labels adamerging_tsv_labels wemoe_labels wemoe_tsv_labels

Everything below was fixed before the first result: a task enters if zero-shot accuracy on its training images is at least twice
chance; each adapting method takes the rate that is best on held-out training images of the first four tasks with seed 0, of four and,
where the best is the first or last of them, of those beyond; tasks stand in the suite's order, and a group of n is the first n of them. An interrupted run goes on where it was.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import load_task, mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.model_merging.protocol import best_rate, choose_rates, times_chance
from peft_moe_merge.mtil.model_merging.report import print_report, write_report
from peft_moe_merge.mtil.model_merging.study import LOSSES, METHODS, Study, StudySettings
from peft_moe_merge.mtil.results import write_results

LEAST = 2.0  # times chance
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
CHOSEN_ON = 4  # tasks
LEFT_OUT = ("wemoe_1_layer", "wemoe_prior", "wemoe_rank_32_mi")  # variants that the table does not need
TABLE = tuple(method for method in METHODS if method not in LEFT_OUT)
GROUP_METHODS = (
    "average",
    "ties",
    "regmean",
    "iso_c",
    "tsv",
    "adamerging_mi",
    "wemoe_mi",
    "e_wemoe_mi",
    "wemoe_tsv_mi",
    "smile",
)
KINDS = {
    "related": ("animals", "flowers", "food", "vehicles"),  # things in photographs, alike in style and size
    "unrelated": ("aerial", "colors", "letters", "textures"),  # each another kind of picture and of question
}
CORRUPTIONS = ("impulse", "pixelate")
ROBUST_METHODS = (
    "pretrained",
    "task_arithmetic",
    "regmean",
    "tsv",
    "adamerging_mi",
    "wemoe_mi",
    "wemoe_tsv_mi",
    "smile",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--finetune_steps", type=int, default=100)
    parser.add_argument("--adapt_steps", type=int, default=40)
    parser.add_argument("--train_per_class", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=TABLE, help="only these, on all tasks together")
    parser.add_argument(
        "--rates", type=Path, help="rates.json of another run, to take rates from; default: choose them"
    )
    parser.add_argument(
        "--only_show", action="store_true", help="run nothing; seeds that are not finished stand as they are"
    )
    args = parser.parse_args()
    if args.only_show:
        files = [args.output_dir / f"seed_{seed}" / "seed.json" for seed in args.seeds]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        if not any(run["rows"] for run in runs):
            raise SystemExit(f"there are no results in {args.output_dir} yet")
        results = {"suite": "mini", "runs": runs}
        print_report(results)
        print("written:", *write_report(results, args.output_dir))
        return

    clip, processor = load_clip(mini_clip_path())
    tasks = [
        replace(t, train=load_task(t.name, "train", train_per_class=args.train_per_class))
        for t in load_suite("mini", None)
    ]
    known = times_chance(tasks, clip, processor)
    tasks = [task for task in tasks if known[task.name] >= LEAST]
    print("times chance:", {name: round(value, 2) for name, value in known.items()}, flush=True)

    settings = StudySettings(finetune_steps=args.finetune_steps, adapt_steps=args.adapt_steps)
    accelerator = Accelerator(cpu=True)
    adapting = [method for method in args.methods or TABLE if method in LOSSES]
    chosen_in = args.rates or args.output_dir / "rates" / "rates.json"
    if args.rates:
        known_rates = json.loads(args.rates.read_text())
        if lacking := [method for method in adapting if method not in known_rates]:
            raise SystemExit(f"{args.rates} has no rates of {lacking}: run without --rates, which chooses them.")
        rates = {m: best_rate(RATES, lambda rate, m=m: known_rates[m][str(rate)]) for m in adapting}
    else:
        first = Study(tasks[:CHOSEN_ON], [], lambda: load_clip(mini_clip_path()), settings, accelerator)
        first.run(chosen_in.parent, methods=(), seed=0)  # refuses what was made with other settings
        run = first.material(clip, processor, chosen_in.parent, 0)
        rates = choose_rates(run, adapting, RATES, chosen_in)
    print("rates:", rates, flush=True)

    names = [task.name for task in tasks]
    groups = {str(size): names[:size] for size in (2, 4, 8) if size < len(names)} | KINDS
    settings = replace(settings, adapt_lrs=[f"{method}={rate}" for method, rate in rates.items()])
    study = Study(tasks, [], lambda: load_clip(mini_clip_path()), settings, accelerator, groups)
    passes = (
        ({"methods": args.methods},)
        if args.methods
        else (
            {"methods": TABLE},
            {"methods": TABLE, "group_methods": GROUP_METHODS},
            {"methods": TABLE, "robust_methods": ROBUST_METHODS, "corruptions": CORRUPTIONS},
        )
    )
    results = {
        "suite": "mini",
        "times_chance": known,
        "rates": json.loads(chosen_in.read_text()),
    }
    for options in passes:
        results["runs"] = [study.run(args.output_dir / f"seed_{s}", seed=s, **options) for s in args.seeds]
        write_results(args.output_dir / "results.json", results)
        print(f"written: {args.output_dir / 'results.json'}", flush=True)


if __name__ == "__main__":
    main()
