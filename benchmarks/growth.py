"""What each further task costs the expert pool: memory, the time of a training step, and the time to add the task.

    python benchmarks/growth.py --output runs/growth.json --figure runs/growth.png
    python benchmarks/growth.py --expert_start merged  # new experts start from the union of old ones
    python benchmarks/growth.py --quick        # a few tasks, to see that it runs

The mini CLIP, 32 images and the prompts of a mini task, two experts of rank 8 a task beside six linear layers of each block,
float32, one thread. After every task that is added, its training steps take turns with those of a twin that knows one task and
never learns another; a ratio is taken within a round, and its median is reported. Times are the processor's, so that others may
use the machine. A step is a forward and a backward pass, AdamW, and the counting of selections.

Measured after each task: parameters and bytes of the adapter, the bytes that the process holds (the twin, gradients and
optimizer states of both included), milliseconds a step and relative to the twin, milliseconds to add the task.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from memory import process_bytes
from peft import PeftModel, get_peft_model
from pool_step_time import make_batch
from rich.console import Console
from rich.table import Table
from rounds import ratios, take_turns, timed, write_json
from torch import Tensor
from tqdm import tqdm

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig
from peft_moe_merge.files import whole
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.report.figures import growth
from peft_moe_merge.report.plots import STYLE

EXPERTS, RANK = 2, 8


class Learner:
    """A pool that learns one task after another, all from the same images.

    Attributes:
        model: the `PeftModel`.
    """

    def __init__(self, batch: dict[str, Tensor], labels: Tensor, expert_start: str):
        torch.manual_seed(0)
        clip, _ = load_clip(mini_clip_path())
        shape = {"experts_per_task": EXPERTS, "r": RANK, "lora_alpha": float(RANK)}
        config = MoELoraMergeConfig.pool(tasks=["task 1"], **shape, expert_start=expert_start)
        self.model: PeftModel = get_peft_model(clip, config).train()
        self.callback = ExpertMergeCallback(None, EXPERTS)
        self.batch, self.labels = batch, labels
        self._begin()

    def _begin(self) -> None:
        self.callback.begin_task(self.model)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def add(self, task: str) -> float:
        """End the task and begin another. Returns the seconds it took."""
        began = time.process_time()
        self.callback.end_task(self.model)
        self.model.add_task(task)
        self.model.set_task(task)
        self._begin()
        return time.process_time() - began

    def step(self) -> None:
        """Take a training step."""
        F.cross_entropy(self.model(**self.batch).logits_per_image, self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.callback.step(self.model, self.optimizer)


def measure(tasks: int, rounds: int, steps: int, batch_size: int, expert_start: str) -> dict[str, list[float]]:
    """Let a pool grow, and measure after each task.

    Args:
        tasks: how many.
        rounds: of the pool and its twin after each task.
        steps: of each in a round.
        batch_size: images a step.
        expert_start: what the experts of a task that is added start from.
    """
    batch, labels = make_batch(batch_size, seed=0)
    first, grown = Learner(batch, labels, expert_start), Learner(batch, labels, expert_start)
    measured: dict[str, list[float]] = {}
    for task in tqdm(range(1, tasks + 1), desc="tasks"):
        added = grown.add(f"task {task}") if task > 1 else None
        turns = {name: timed(one.step, "cpu", steps) for name, one in (("first", first), ("grown", grown))}
        seconds = {name: phases["step"] for name, phases in take_turns(turns, rounds, f"task {task}").items()}
        own = [parameter for name, parameter in grown.model.named_parameters() if "moe_lora" in name]
        now = {
            "parameters": sum(parameter.numel() for parameter in own),
            "memory": sum(parameter.numel() * parameter.element_size() for parameter in own),
            "resident": process_bytes("VmRSS"),
            "step_seconds": statistics.median(seconds["grown"]),
            "step_ratio": statistics.median(ratios(seconds["grown"], seconds["first"])),
        }
        if added is not None:
            now["add_seconds"] = added
        for name, value in now.items():
            measured.setdefault(name, []).append(value)
    return measured


def figure_of(measured: dict[str, list[float]]) -> Any:
    """Draw what is measured; the first task is not added, so that its time is missing."""
    shown = {name: [measured[name]] for name in ("memory", "resident", "step_ratio")}
    return growth({"pool": {**shown, "add_seconds": [[float("nan"), *measured["add_seconds"]]]}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=50, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of the pool and of its twin in a round")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--expert_start", default="fresh", choices=["fresh", "merged"])
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--figure", type=Path, help="draw them as a PNG")
    parser.add_argument("--quick", action="store_true", help="4 tasks, 1 round of one step")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.rounds, args.steps = 4, 1, 1
    for name, least in (("tasks", 2), ("rounds", 1), ("steps", 1), ("batch_size", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} is to be at least {least}, got {getattr(args, name)}")
    torch.set_num_threads(1)
    measured = measure(args.tasks, args.rounds, args.steps, args.batch_size, args.expert_start)

    table = Table("tasks", "adapter, MB", "held, MB", "step, ms", "step, x one task", "adding, ms")
    for index in sorted({0, *range(9, args.tasks, 10), args.tasks - 1}):
        added = f"{1e3 * measured['add_seconds'][index - 1]:.0f}" if index else ""
        megabytes = (f"{measured[name][index] / 1e6:.1f}" for name in ("memory", "resident"))
        times = f"{1e3 * measured['step_seconds'][index]:.0f}", f"{measured['step_ratio'][index]:.2f}"
        table.add_row(str(index + 1), *megabytes, *times, added)
    Console().print(table)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        write_json(args.output, {"settings": settings, "versions": {"torch": torch.__version__}, "measured": measured})
    if args.figure:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE), whole(args.figure) as unfinished:
            figure_of(measured).savefig(unfinished, format="png", dpi=90)


if __name__ == "__main__":
    main()
