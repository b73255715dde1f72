"""The memory that merging fine-tuned copies takes: each way in a process of its own, from folders, with random weights.

    python benchmarks/merging_memory.py                          # 8 ViT-B/32 vision towers, about 3 GB of temporary files
    python benchmarks/merging_memory.py --layers 2 --width 128   # seconds

What is reported is the peak of resident memory beyond what the process had with the base model read, in multiples of one
tower. Linux only. Pages of files that the system keeps mapped count as resident, so that it is an upper bound. The bound that is
printed beside a WEMoE's: what the merged model has beyond the base, and the work on one weight, `WORK` tensors of the size of the
largest for each task. A static merge holds the merged weights a second time while it puts them into the model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from memory import process_bytes
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from peft_moe_merge import WEMoEConfig, merge_finetuned
from peft_moe_merge.model_merging.static import merge_static
from peft_moe_merge.mtil.methods.lora import TARGETS

WORK = 4
"""A weight's changes stacked, in double precision what is decomposed, and the parts they are put together from."""

WAYS = {
    "whole task vectors": {},
    "sparsity 0.9": {"sparsity": 0.9},
    "rank 32": {"rank": 32},
    "LoRAs, rank 8": {"rank": 8},
    "task_arithmetic": None,
}


def tower(layers: int, width: int) -> CLIPVisionModel:
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return CLIPVisionModel(CLIPVisionConfig(**size, num_attention_heads=width // 64, patch_size=32))


def prepare(folder: Path, tasks: int, layers: int, width: int) -> None:
    """Write the base, copies with noise on it, and LoRAs."""
    base = tower(layers, width)
    base.save_pretrained(folder / "base")
    for task in range(tasks):
        generator = torch.Generator().manual_seed(task)
        copied = {
            n: p + 1e-3 * torch.randn(p.shape, generator=generator)
            for n, p in base.state_dict().items()
            if p.is_floating_point()
        }
        base.save_pretrained(folder / f"copy_{task}", state_dict=copied)
        lora = get_peft_model(tower(layers, width), LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False))
        lora.save_pretrained(folder / f"lora_{task}")


def measure(folder: Path, tasks: int, way: str) -> dict[str, float]:
    """Merge, in this process, and return bytes: of one tower, before, and how far the peak is above."""
    base = CLIPVisionModel.from_pretrained(folder / "base")
    sizes = [p.numel() * p.element_size() for p in base.parameters()]
    sum(p.detach().sum() for p in base.parameters())  # a file that was loaded is only mapped until it is read
    kind = "lora" if way.startswith("LoRAs") else "copy"
    sources = {str(task): folder / f"{kind}_{task}" for task in range(tasks)}
    before = process_bytes("VmRSS")
    options = WAYS[way]
    if options is None:
        model = merge_static(base, sources, way)
        stays = sum(sizes)
    else:
        model = merge_finetuned(base, sources, WEMoEConfig(**options))
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict().values()}
        stays = sum(tensors.values()) - sum(sizes)
    bound = stays + WORK * tasks * max(sizes) if options is not None else None
    return {"tower": sum(sizes), "stays": stays, "added": process_bytes("VmHWM") - before, "bound": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # in the processes that this one starts
    args = parser.parse_args()
    if args.measure:
        folder, way = args.measure
        print(json.dumps(measure(Path(folder), args.tasks, way)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.tasks, args.layers, args.width)
        for way in args.ways:
            command = [sys.executable, __file__, "--tasks", str(args.tasks), "--measure", folder, way]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(told.splitlines()[-1])
            tower, stays, added = (found[what] / 1e6 for what in ("tower", "stays", "added"))
            print(
                f"{way:20s} one tower {tower:6.1f} MB   beyond the base: what stays {stays:7.1f} MB   "
                f"peak {added:7.1f} MB = {added / tower:.2f} towers"
                + (f"   bound {found['bound'] / 1e6:7.1f} MB" if found["bound"] else ""),
                flush=True,
            )


if __name__ == "__main__":
    main()
