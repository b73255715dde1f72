"""What a training step costs, in time and in memory, side by side with its floor and with a plain mixture of experts.

    python benchmarks/step_time.py --output runs/step_time.json    # ViT-B/16, all cells
    python benchmarks/step_time.py --quick                         # a small CLIP, the same numbers in under a minute
    python benchmarks/step_time.py --output ... --resume           # go on after an interruption

Weights are random and the data are noise: neither changes what a step costs. No network. The contestants:

- floor: CLIP without any adapter, yet with gradients through every block of both towers. All weights are frozen but the
  image tower's class embedding and the text tower's position embeddings, which lie before the first block.
- ours: the adapter with one task, prompts padded to the longest, and the counting of selections after every step.
- dispatch: a plain mixture of experts on the same CLIP, written here: every expert is called in Python on the samples that
  chose it, prompts are padded to 77 tokens.
- clip: the untouched image tower, against ours with images of eleven tasks in one batch, their tasks known.

The contestants of a cell take turns in one process, a step each, in an order that rotates from round to round. A ratio
is taken within a round; reported are medians over rounds, and the quartiles as their spread. Peak memory is measured in a
process for each contestant.
"""

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from dispatch import add_dispatch
from memory import STATUS, process_bytes
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from rounds import finish, quartiles, take_turns, write_json
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel

from peft_moe_merge import MoELoraMergeConfig

MERGE_EVERY = 100
TASKS = 11

VIT_B16 = {"vision_config": {"patch_size": 16}}
SMALL = {
    "vision_config": {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 3}
    | {"image_size": 112, "patch_size": 16},
    "text_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2},
    "projection_dim": 64,
}

# name of the cell: contestants, prompts, bf16?, whether one of the fixed numbers comes from it, which earns more rounds
TRAINING: dict[str, tuple[list[str], int, bool, bool]] = {
    "32 prompts": (["floor", "ours 55", "dispatch 55"], 32, False, True),
    "22 or 220 experts": (["ours 22", "ours 220"], 32, False, True),
    "10 prompts": (["floor", "ours 55"], 10, False, False),
    "100 prompts": (["floor", "ours 55", "dispatch 55"], 100, False, False),
    "32 prompts, bf16": (["floor", "ours 55", "dispatch 55"], 32, True, False),
    "397 prompts": (["ours 55", "dispatch 55"], 397, False, False),  # needs 23 GB, for the dispatch's 30569 tokens
}

# key: cell, what is divided, by what
RATIOS = {
    "step_over_floor": ("32 prompts", "ours 55", "floor"),
    "dispatch_over_ours_32": ("32 prompts", "dispatch 55", "ours 55"),
    "dispatch_over_ours_397": ("397 prompts", "dispatch 55", "ours 55"),
    "e220_over_e22": ("22 or 220 experts", "ours 220", "ours 22"),
    "inference_over_clip": ("inference", "ours 55", "clip"),
}
TARGETS = {
    "step_over_floor": ("at most", 1.10),
    "dispatch_over_ours_32": ("at least", 1.5),
    "dispatch_over_ours_397": ("at least", 2.5),
    "e220_over_e22": ("at most", 1.05),
    "merge_share": ("at most", 0.005),
    "extra_memory_gb": ("at most", 2.0),
    "inference_over_clip": ("at most", 1.10),
}


class Contestant:
    """One way to take a training step, with a model and an optimizer of its own.

    Args:
        name: "floor", "clip", or "ours" or "dispatch" and the number of experts.
        clip: the model it starts from, whose weights it shares with the other contestants as long as nobody trains them.
        tasks: of ours.
    """

    def __init__(self, name: str, clip: CLIPModel, device: str, seed: int, tasks: int = 1):
        kind, _, num_experts = name.partition(" ")
        torch.manual_seed(seed)
        weights = clip.state_dict()
        clip = CLIPModel(clip.config)
        clip.load_state_dict(weights, assign=True)
        self.longest = kind != "dispatch"
        self.ours = kind == "ours"
        if kind == "ours":
            config = MoELoraMergeConfig(num_experts=int(num_experts), tasks=[f"task {i}" for i in range(tasks)])
            clip.requires_grad_(False)
            self.model: nn.Module = get_peft_model(clip, config)
        elif kind == "dispatch":
            self.model = add_dispatch(clip, int(num_experts))
        else:
            self.model = clip.requires_grad_(False)
        if kind == "floor":
            embeddings = (
                clip.vision_model.embeddings.class_embedding,
                clip.text_model.embeddings.position_embedding.weight,
            )
            for parameter in embeddings:
                parameter.data = parameter.data.clone()
                parameter.requires_grad_(True)
        self.model.to(device).train()
        self.seconds: dict[str, float] = {}
        for phase, tower in (("image", clip.vision_model), ("text", clip.text_model)):
            tower.register_forward_pre_hook(partial(lambda phase, *_: self.begin(phase), phase))
            tower.register_forward_hook(partial(lambda phase, *_: self.end(phase), phase))
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if parameters:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, fused=True)
            # Later in training every expert has been selected at some time: the optimizer's state is all there.
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def begin(self, phase: str) -> None:
        finish()
        self.seconds[phase] = -time.perf_counter()

    def end(self, phase: str) -> None:
        finish()
        self.seconds[phase] += time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin(name)
        yield
        self.end(name)

    def train(self, batch: dict[str, Tensor], autocast: torch.autocast) -> dict[str, float]:
        """Take a step and return the seconds of its phases, of the whole, and of a merge after it."""
        self.seconds = {}
        tokens_NL = batch["tokens_NL"] if self.longest else batch["padded_NL"]
        with self.phase("step"):
            with autocast:
                logits_BN = self.model(pixel_values=batch["images"], input_ids=tokens_NL).logits_per_image
                loss = F.cross_entropy(logits_BN.float(), batch["labels"], label_smoothing=0.2)
            with self.phase("backward"):
                loss.backward()
            with self.phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.ours:
                with self.phase("count"):
                    self.model.share_expert_usage()
        if self.ours:  # after the step, since it happens once in MERGE_EVERY of them
            with self.phase("merge"):
                self.model.merge_experts(self.optimizer)
        return self.seconds

    @torch.no_grad()
    def encode(self, batch: dict[str, Tensor], autocast: torch.autocast) -> dict[str, float]:
        """Encode images, each by the routers of its own task if ours."""
        self.seconds = {}
        self.model.eval()
        ids = {"task_ids": batch["task_ids"]} if self.ours else {}
        with self.phase("step"), autocast:
            self.model.get_image_features(batch["images"], **ids)
        return self.seconds


def make_clip(settings: dict[str, Any], args: argparse.Namespace) -> CLIPModel:
    torch.manual_seed(args.seed)
    return CLIPModel(CLIPConfig(**settings)).to(args.device)


def make_batch(settings: dict[str, Any], images: int, prompts: int, device: str, seed: int) -> dict[str, Tensor]:
    """Make noise images, and prompts of 8 to 14 tokens, as "a photo of a <class>." has them."""
    generator = torch.Generator().manual_seed(seed)
    config = CLIPConfig(**settings)
    size, text = config.vision_config.image_size, config.text_config
    lengths_N = torch.randint(8, 15, (prompts, 1), generator=generator)
    lengths_N[0] = 14
    position_L = torch.arange(text.max_position_embeddings)
    padded_NL = torch.randint(1000, 40000, (prompts, len(position_L)), generator=generator)
    padded_NL[:, 0] = text.bos_token_id
    padded_NL[position_L >= lengths_N - 1] = text.eos_token_id
    batch = {
        "images": torch.randn(images, 3, size, size, generator=generator),
        "labels": torch.randint(0, prompts, (images,), generator=generator),
        "padded_NL": padded_NL,
        "tokens_NL": padded_NL[:, : lengths_N.max()],
        "task_ids": torch.arange(images) % TASKS,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def training_cell(cell: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    names, prompts, bf16, key = TRAINING[cell]
    batch = make_batch(settings, args.batch_size, prompts, args.device, args.seed)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=bf16)
    clip = make_clip(settings, args)
    contestants = {name: Contestant(name, clip, args.device, args.seed) for name in names}
    steps = {name: partial(contestant.train, batch, autocast) for name, contestant in contestants.items()}
    return take_turns(steps, args.rounds if key else max(1, args.rounds // 3), cell)


def inference_cell(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    batch = make_batch(settings, args.batch_size, 1, args.device, args.seed)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=False)
    clip = make_clip(settings, args)
    contestants = {name: Contestant(name, clip, args.device, args.seed, TASKS) for name in ("clip", "ours 55")}
    learn(contestants["ours 55"].model, args.seed)
    passes = {name: partial(contestant.encode, batch, autocast) for name, contestant in contestants.items()}
    return take_turns(passes, args.rounds, "inference")


def learn(model: nn.Module, seed: int) -> None:
    """Give routers and experts weights as if they had learnt, so that tasks choose different experts."""
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moe_lora_" in name:
                parameter.normal_(std=0.02, generator=generator)


def peak_memory(name: str, settings: dict[str, Any], args: argparse.Namespace) -> float:
    """Return by how many GB (1e9 bytes) the process grew at most while it built a contestant and took some steps."""
    before = peak_bytes()
    batch = make_batch(settings, args.batch_size, 32, args.device, args.seed)
    contestant = Contestant(name, make_clip(settings, args), args.device, args.seed)
    for _ in range(2):  # the second begins with all that outlives a step
        contestant.train(batch, torch.autocast(args.device, torch.bfloat16, enabled=False))
    return (torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_bytes() - before) / 1e9


def peak_bytes() -> int:
    """Return the largest size this process had."""
    if STATUS.exists():
        return process_bytes("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_cell(args: argparse.Namespace) -> dict[str, list[float]]:
    peaks: dict[str, list[float]] = {"floor": [], "ours 55": [], "dispatch 55": []}
    own = [sys.executable, str(Path(__file__).resolve()), *(["--quick"] if args.quick else [])]
    own += ["--batch_size", str(args.batch_size), "--device", args.device, "--seed", str(args.seed)]
    own += ["--threads", str(args.threads)]
    for _ in tqdm(range(1 if args.quick else 2), desc="memory", leave=False):
        for name, values in peaks.items():
            done = subprocess.run([*own, "--memory", name], stdout=subprocess.PIPE, text=True, check=True)
            values.append(json.loads(done.stdout.splitlines()[-1]))
    return peaks


def fixed_numbers(cells: dict[str, Any]) -> dict[str, Any]:
    """Compute the fixed numbers from the finished cells, each a median with its spread."""
    values: dict[str, list[float]] = {}
    for key, (cell, above, below) in RATIOS.items():
        if cell in cells:
            pairs = zip(cells[cell][above]["step"], cells[cell][below]["step"], strict=True)
            values[key] = [one / other for one, other in pairs]
    if "32 prompts" in cells:
        ours = cells["32 prompts"]["ours 55"]
        values["merge_share"] = [
            (merge / MERGE_EVERY + count) / (merge / MERGE_EVERY + step)
            for merge, count, step in zip(ours["merge"], ours["count"], ours["step"], strict=True)
        ]
    if "memory" in cells:
        peaks = zip(cells["memory"]["ours 55"], cells["memory"]["floor"], strict=True)
        values["extra_memory_gb"] = [ours - floor for ours, floor in peaks]
    numbers = {}
    for key in TARGETS:
        if key in values:
            numbers[key], numbers[f"{key}_spread"] = quartiles(values[key])
    return numbers


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """Yield the cells and the fixed numbers as tables."""
    times = Table(title=f"seconds a step, {result['settings']['batch_size']} images, medians")
    phases = ("step", "image", "text", "backward", "optimizer", "count", "merge")
    for column in ("cell", "", *phases):
        times.add_column(column, justify="left" if column in ("cell", "") else "right")
    for cell, contestants in result["cells"].items():
        if cell == "memory":
            continue
        for name, seconds in contestants.items():
            medians = (f"{statistics.median(seconds[phase]):.4g}" if phase in seconds else "" for phase in phases)
            times.add_row(cell, name, *medians)
    yield times

    numbers = Table(title="medians of ratios within a round")
    for column in ("", "median", "quartiles", "target", "met"):
        numbers.add_column(column)
    for name, values in result["cells"].get("memory", {}).items():
        median, (low, high) = quartiles(values)
        numbers.add_row(f"peak GB, {name}", f"{median:.2f}", f"{low:.2f} to {high:.2f}", "", "")
    for key, (side, target) in TARGETS.items():
        if key in result:
            value, (low, high) = result[key], result[f"{key}_spread"]
            met = value <= target if side == "at most" else value >= target
            numbers.add_row(
                key, f"{value:.4g}", f"{low:.4g} to {high:.4g}", f"{side} {target:g}", "yes" if met else "no"
            )
    yield numbers


def machine(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small CLIP instead of ViT-B/16, and few rounds")
    parser.add_argument("--batch_size", type=int, default=16, help="images a step; the paper trains with 64")
    parser.add_argument("--rounds", type=int, help="of the cells the fixed numbers come from; others get a third")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="+", choices=[*TRAINING, "inference", "memory"], help="only these")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, after every cell anew")
    parser.add_argument("--resume", action="store_true", help="keep the cells that --output has already")
    parser.add_argument("--memory", metavar="CONTESTANT", help="print the peak memory of one contestant, and no more")
    args = parser.parse_args()
    if args.resume and args.output is None:
        parser.error("--resume goes on with the file given by --output")
    args.rounds = args.rounds or (3 if args.quick else 9)
    torch.set_num_threads(args.threads)
    settings = SMALL if args.quick else VIT_B16
    if args.memory:
        print(peak_memory(args.memory, settings, args))
        return

    told = {"quick": args.quick, "batch_size": args.batch_size, "rounds": args.rounds, "seed": args.seed}
    result: dict[str, Any] = {"settings": told, "machine": machine(args), "cells": {}}
    if args.resume and args.output.exists():
        earlier = json.loads(args.output.read_text())
        if (earlier["settings"], earlier["machine"]) != (result["settings"], result["machine"]):
            parser.error(f"{args.output} was measured with other settings or elsewhere: {earlier['settings']}")
        result["cells"] = earlier["cells"]
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        **{cell: partial(training_cell, cell, settings, args) for cell in TRAINING},
        "inference": partial(inference_cell, settings, args),
        "memory": partial(memory_cell, args),
    }
    runs["397 prompts"] = runs.pop("397 prompts")  # last: where memory is short, all else is done
    for cell, run in tqdm(runs.items(), desc="cells"):
        if cell in (args.cells or runs) and cell not in result["cells"]:
            result["cells"][cell] = run()
            gc.collect()  # hooks and their models refer to one another
            result |= fixed_numbers(result["cells"])
            if args.output:
                write_json(args.output, result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for table in tables(result):
        console.print(table)


if __name__ == "__main__":
    main()
