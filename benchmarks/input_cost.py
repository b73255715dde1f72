"""What bringing images to the model costs, and in what layout it takes them.

    python benchmarks/input_cost.py --device cuda --model openai/clip-vit-base-patch16
    python benchmarks/input_cost.py --quick                    # the mini CLIP on the CPU

- workers: images a second that the training batches of the stream come to, decoded and cropped by 0, 2, ... processes;
- copies: milliseconds for a batch from the host's memory to the device, from ordinary and from pinned memory;
- layout: milliseconds of a pass of the image tower, forward and backward, with images and the patch embedding contiguous and
  channels last, in float32 and under autocast in bf16 and, on a GPU, fp16.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rounds import take_turns, timed, write_json
from torch import Tensor
from transformers import CLIPModel

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import train_batches
from peft_moe_merge.mtil.data.mini import load_task, mini_clip_path


def images_per_second(processor: object, workers: int, batch_size: int, steps: int) -> float:
    """Draw training batches, and leave out the first, in which processes start."""
    rows = load_task("food", "train")
    batches = iter(
        train_batches(
            rows, processor, steps=steps + 1, batch_size=batch_size, seed=0, crop_scale=0.9, num_workers=workers
        )
    )
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    return steps * batch_size / (time.perf_counter() - began)


def copies(pixels: Tensor, device: str) -> dict[str, Callable[[], object]]:
    """Name the ways of a batch to a device."""
    made = {"ordinary": partial(pixels.to, device, copy=True)}
    if device != "cpu":
        made["pinned"] = partial(pixels.pin_memory().to, device, non_blocking=True)
    return made


def layouts(clip: CLIPModel, pixels: Tensor, device: str) -> dict[str, Callable[[], object]]:
    """Name the passes: layouts times precisions."""

    def run(layout: torch.memory_format, dtype: torch.dtype | None) -> None:
        clip.vision_model.embeddings.patch_embedding.to(memory_format=layout)
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            output = clip.get_image_features(pixels.to(device, memory_format=layout)).pooler_output
        output.float().square().mean().backward()
        clip.zero_grad()

    precisions = {"float32": None, "bf16": torch.bfloat16, **({"fp16": torch.float16} if device != "cpu" else {})}
    memory = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
    return {
        f"{name}, {dtype}": partial(run, layout, of)
        for dtype, of in precisions.items()
        for name, layout in memory.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=mini_clip_path(), help="default: the mini CLIP")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=20, help="batches that are drawn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="few images, no processes, one round")
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.workers, args.steps, args.rounds = 8, [0], 2, 1
    clip, processor = load_clip(args.model)
    clip.to(args.device)
    size = clip.config.vision_config.image_size
    pixels = torch.randn(args.batch_size, 3, size, size)
    drawn = {
        f"{workers} workers": images_per_second(processor.image_processor, workers, args.batch_size, args.steps)
        for workers in args.workers
    }
    table = Table("", "images a second")
    for name, value in drawn.items():
        table.add_row(name, f"{value:.0f}")
    Console().print(table)
    results = {"settings": {name: str(value) for name, value in vars(args).items()}, "workers": drawn}
    for title, runs in (("copies", copies(pixels, args.device)), ("layout", layouts(clip, pixels, args.device))):
        seconds = take_turns({name: timed(run) for name, run in runs.items()}, args.rounds, title)
        results[title] = {name: 1e3 * statistics.median(phases["step"]) for name, phases in seconds.items()}
        table = Table(title, "ms")
        for name, value in results[title].items():
            table.add_row(name, f"{value:.2f}")
        Console().print(table)
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
