"""Whether merged experts know more of tasks still to come than plain CLIP does.

    python benchmarks/whole_table.py --methods moe_lora_warm --output_dir runs/table
    python benchmarks/unseen_tasks.py runs/table/seed_*/moe_lora_warm/seed_*

Nothing is trained. A task that is added with `expert_start="merged"` and does not learn is the union of those before. Here it is that of
the first task of a run, then of the first two, and so on, and is tested on all tasks that came later, beside plain CLIP. Printed are
both Transfers and what Average would be, run by run and their difference. The runs have to be at their end.
"""

import argparse
import json
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from peft_moe_merge.mtil.checkpoint import newest
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.metrics.mtil import stream_metrics
from peft_moe_merge.mtil.stream import Stream, StreamSettings
from peft_moe_merge.report.statistics import estimate
from peft_moe_merge.report.tables import difference, spread
from peft_moe_merge.tuners.moe_lora_merge.expert_pool import STARTS_FROM

OTHERS = "all others"


class Unseen(METHODS["moe_lora_warm"]):
    """A run that has ended, every task of which takes the experts of one that has not learnt."""

    name = "unseen"

    def prepare_evaluation(self, task):
        self.set_task(OTHERS)


def measure(folder: Path, suite: str, model: str) -> dict[str, float]:
    """Test a run's unions on the tasks after them; return Transfer and Average with them and with plain CLIP."""
    checkpoint = newest(folder)
    if checkpoint is None:
        raise SystemExit(
            f"{str(folder)!r} holds no run: give folders such as runs/table/seed_100/moe_lora_warm/seed_100."
        )
    results = [json.loads(file.read_text())["matrix"] for file in sorted(checkpoint.glob("results_*.json"))]
    set_seed(0)
    method = Unseen(*load_clip(model), MethodSettings())
    method.load(checkpoint)
    by_name = {task.name: task for task in load_suite(suite)}
    tasks = [by_name[name] for name in method.learnt]
    stream = Stream(tasks, StreamSettings(), Accelerator(cpu=True))
    method.model.add_task(OTHERS)
    matrix = [list(row) for row in results]
    for learnt in range(1, len(tasks)):
        method.model.start_merged(OTHERS, method.learnt[:learnt][-STARTS_FROM:])
        for later in range(learnt, len(tasks)):
            matrix[learnt - 1][later] = stream.accuracy(method, tasks[later])
    return {
        f"{metric}, {how}": stream_metrics(of)[metric.lower()]
        for how, of in (("plain CLIP", results), ("merged", matrix))
        for metric in ("Transfer", "Average")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of moe_lora_warm that are at their end")
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--model", default=str(mini_clip_path()))
    options = parser.parse_args()
    found = []
    for folder in options.runs:
        found.append(measure(folder, options.suite, options.model))
        print(folder, {name: round(value, 2) for name, value in found[-1].items()}, flush=True)
    table = Table(title="Tasks still to come, in %: means over runs, ± and brackets Student's 95 % interval")
    for column in ("", "plain CLIP", "merged experts", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for metric in ("Transfer", "Average"):
        plain, merged = ([run[f"{metric}, {how}"] for run in found] for how in ("plain CLIP", "merged"))
        gained = estimate([after - before for before, after in zip(plain, merged, strict=True)])
        table.add_row(metric, spread(estimate(plain), 2), spread(estimate(merged), 2), difference(gained))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
