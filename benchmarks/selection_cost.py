"""What choosing the task costs at inference: plain CLIP's image pass against choosing a task per image and routing by it.

    python benchmarks/selection_cost.py [--quick] [--rounds 9] [--batch 16] [--threads N] [--cpu_time]
        [--output cost.json]

A ViT-B/16 with random weights, 11 tasks, 55 experts a block; with `--quick` a much smaller model. All contestants run once
per round, in an order that moves on by one each round; printed are medians over rounds of the ratio to plain CLIP in the
same round, with the quartiles. Every image is routed, and they are spread evenly over the tasks: the dearest case.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from rounds import quartiles, ratios, take_turns, timed, write_json
from transformers import CLIPConfig, CLIPModel

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.selection import AutoencoderSelector, GaussianSelector, ImageFeatures, PatchTokens, Selector

TASKS = 11
TARGET = 1.25
SIZES = {
    # width, layers, heads, image size, patch size, experts, expert rank
    "vit-b/16": (768, 12, 12, 224, 16, 55, 64),
    "quick": (192, 12, 3, 64, 16, 8, 16),
}


def adapted_clip(size: str) -> PeftModel:
    """Make a CLIP with 11 tasks whose routers and experts are random, as if they had learnt."""
    width, layers, heads, image_size, patch_size, experts, rank = SIZES[size]
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    tasks = [f"task {number}" for number in range(TASKS)]
    config = MoELoraMergeConfig(num_experts=experts, r=rank, tasks=tasks, init_weights=False)
    model = get_peft_model(clip, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "routers" in name:
                parameter.normal_()
    return model


def fitted(selector: Selector, model: PeftModel, pixels: torch.Tensor) -> Selector:
    """Fit a selector to random features of the right width, 11 tasks."""
    features = model.frozen_features(selector.source, pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in range(TASKS):
            selector.fit(f"task {task}", features.repeat(8, 1) + torch.randn_like(features.repeat(8, 1)))
    return selector


def contestants(model: PeftModel, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name everything that is compared; each is one call."""
    ids = torch.arange(len(pixels), device=pixels.device) % TASKS
    plain_ids, one_task = torch.full_like(ids, -1), torch.zeros_like(ids)

    def selecting(selector: Selector) -> Callable[[], object]:
        fitted(selector, model, pixels)

        def run() -> object:
            selector.select(model.frozen_features(selector.source, pixels))
            # the ids chosen from random images are all alike; those of the dearest case take their place
            return model.get_image_features(pixels, task_ids=ids)

        return run

    runs: dict[str, Callable[[], object]] = {
        "plain": lambda: model.get_image_features(pixels, task_ids=plain_ids),
        "known, one task": lambda: model.get_image_features(pixels, task_ids=one_task),
        "known, all tasks": lambda: model.get_image_features(pixels, task_ids=ids),
    }
    for depth in (1, 2, 3):
        runs[f"selected, patch tokens of depth {depth}"] = selecting(
            GaussianSelector(PatchTokens(depth), reject_rate=0)
        )
    runs["selected, image features"] = selecting(GaussianSelector(ImageFeatures(), reject_rate=0))
    autoencoders = AutoencoderSelector(ImageFeatures(), iterations=1, reject_rate=0)
    runs["selected, image features, autoencoders"] = selecting(autoencoders)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model, within a minute")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16, help="images per call")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count this process's processor time: on a busy machine, with one thread",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    size = "quick" if arguments.quick else "vit-b/16"
    model = adapted_clip(size).to(arguments.device)
    image_size = SIZES[size][3]
    pixels = torch.randn(arguments.batch, 3, image_size, image_size).to(arguments.device)
    result = {"model": size, "batch": arguments.batch, "tasks": TASKS, "target": TARGET}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result["rounds"] = arguments.rounds
    result["clock"] = "processor time" if arguments.cpu_time else "time"
    clock = "cpu" if arguments.cpu_time else "wall"
    runs = {name: timed(run, clock) for name, run in contestants(model, pixels).items()}
    with torch.inference_mode():
        seconds = take_turns(runs, arguments.rounds, "rounds")
    table = Table(
        title=f"{size}, {arguments.batch} images, {TASKS} tasks: {result['clock']} / plain CLIP's image pass"
    )
    for heading in ("", "median", "quartiles"):
        table.add_column(heading)
    for name, own in seconds.items():
        result[name], result[f"{name}_spread"] = quartiles(ratios(own["step"], seconds["plain"]["step"]))
        low, high = result[f"{name}_spread"]
        table.add_row(name, f"{result[name]:.2f}", f"{low:.2f} to {high:.2f}")
    if arguments.output:
        write_json(arguments.output, result)
    Console().print(table)


if __name__ == "__main__":
    main()
