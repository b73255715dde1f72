"""What the expert pool costs beside PEFT's LoRA of the same active rank, and what it costs to know many tasks.

    python benchmarks/pool_step_time.py --output runs/pool_step_time.json
    python benchmarks/pool_step_time.py --clock cpu    # where others use the cores
    python benchmarks/pool_step_time.py --quick        # a few rounds, to see that it runs

On the mini CLIP, 32 images of a mini task and one prompt a class, float32, one thread. All stand beside the same six linear
layers of both towers and train the same number of weights there (the pool's routers come on top):

- LoRA: PEFT's, rank 16.
- 1 x r16: the pool, one expert of rank 16 a task, 11 tasks.
- 2 x r8: the pool, two experts of rank 8 a task, weighed by the task's router, 11 tasks: E = 22.
- 2 x r8, 110 tasks: the same with E = 220.

A training step is a forward pass, the cross-entropy over the prompts, the backward pass, AdamW, and the counting of selections
that `ExpertMergeCallback` asks for; inference is a forward pass of both towers without gradients. The contestants take turns in
one process, some steps each, in an order that rotates from round to round; a ratio is taken within a round. Reported are
medians over rounds, and the range. `--clock cpu` counts the processor's time and not the wall's.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peft
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from rounds import CLOCKS, ratios, take_turns, timed, write_json
from torch import Tensor, nn
from transformers import CLIPProcessor

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path
from peft_moe_merge.tuners.moe_lora_merge.config import POOL


def pool(experts: int, r: int, tasks: int) -> MoELoraMergeConfig:
    names = [f"task {task}" for task in range(tasks)]
    return MoELoraMergeConfig.pool(tasks=names, experts_per_task=experts, top_k=experts, r=r, lora_alpha=float(r))


CONTESTANTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, target_modules=list(POOL["target_modules"])),
    "1 x r16": lambda: pool(1, 16, 11),
    "2 x r8": lambda: pool(2, 8, 11),
    "2 x r8, 110 tasks": lambda: pool(2, 8, 110),
}

RATIOS = [("1 x r16", "LoRA"), ("2 x r8", "LoRA"), ("2 x r8, 110 tasks", "2 x r8")]


class Contestant:
    """A model of its own on the mini CLIP, with its optimizer.

    Attributes:
        model: the `PeftModel`.
        trained: how many numbers it trains.
    """

    def __init__(self, name: str, seed: int, device: str = "cpu"):
        torch.manual_seed(seed)
        clip, _ = load_clip(mini_clip_path())
        self.model: nn.Module = get_peft_model(clip, CONTESTANTS[name]()).to(device)
        self.counts = name != "LoRA"
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in parameters)
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)

    def train(self, batch: dict[str, Tensor], labels: Tensor) -> None:
        """Take a training step."""
        F.cross_entropy(self.model(**batch).logits_per_image, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.counts:
            self.model.share_expert_usage()

    @torch.no_grad()
    def infer(self, batch: dict[str, Tensor], labels: Tensor) -> None:
        """Score the images."""
        self.model(**batch)


def make_batch(images: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draw images of the first mini task, and tokenize a prompt for each of its classes."""
    name = next(iter(TASKS))
    rows = load_task(name, "train").shuffle(seed=seed)[:images]
    task = TASKS[name]
    prompts = [task.templates[0].format(label) for label in task.classes]
    batch = CLIPProcessor.from_pretrained(mini_clip_path())(
        images=rows["image"], text=prompts, padding=True, return_tensors="pt"
    )
    return dict(batch), torch.tensor(rows["label"])


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def compare(seconds: dict[str, list[float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds a step, and ratios within rounds."""
    return {
        "milliseconds": {name: summary([1e3 * value for value in values]) for name, values in seconds.items()},
        "ratios": {f"{ours} / {other}": summary(ratios(seconds[ours], seconds[other])) for ours, other in RATIOS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of each contestant in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="2 rounds of one step")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = 2, 1
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu adds up the time of all threads: use --threads 1")
    torch.set_num_threads(args.threads)

    batch, labels = make_batch(args.batch_size, args.seed)
    batch, labels = {name: tensor.to(args.device) for name, tensor in batch.items()}, labels.to(args.device)
    contestants = {name: Contestant(name, args.seed, args.device) for name in CONTESTANTS}
    settings = {name: str(value) for name, value in vars(args).items()}
    results = {
        "settings": settings | {"prompts": len(batch["input_ids"]), "tokens": batch["input_ids"].shape[1]},
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "trained": {name: contestant.trained for name, contestant in contestants.items()},
    }
    console = Console()
    for phase, training in (("training step", True), ("inference", False)):
        steps = {}
        for name, contestant in contestants.items():
            contestant.model.train(training)
            take = contestant.train if training else contestant.infer
            steps[name] = timed(partial(take, batch, labels), args.clock, args.steps)
        results[phase] = rows = compare(
            {name: seconds["step"] for name, seconds in take_turns(steps, args.rounds, phase).items()}
        )
        table = Table("", "median", "lowest", "highest", title=f"{phase}, {args.batch_size} images")
        for name, row in rows["milliseconds"].items():
            table.add_row(f"{name}, ms", *(f"{value:.1f}" for value in row.values()))
        for name, row in rows["ratios"].items():
            table.add_row(name, *(f"{value:.2f}" for value in row.values()))
        console.print(table)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
