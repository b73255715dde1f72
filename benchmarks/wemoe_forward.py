"""Per-sample forward and backward passes of one WEMoE block, side by side with a plain loop over the images.

    python benchmarks/wemoe_forward.py                  # one ViT-B/32 MLP block, 8 tasks, 16 images of 50 tokens
    python benchmarks/wemoe_forward.py --quick          # a narrow block, seconds
    python benchmarks/wemoe_forward.py --tokens 1 10 50 # where the cost rule changes sides
    python benchmarks/wemoe_forward.py --vit --rounds 3 # a whole ViT-B/32 and 64 images; 8 GB of memory, tens of minutes

The loop merges the weights of one image at a time, tensor by tensor and task by task, and runs the block on that
image, as a direct implementation of arXiv 2402.00433 does. All contestants get the same gates' router, weights and
images; they take turns in one process, and medians of times and of ratios within a turn are reported. Where others use the
cores, `--clock cpu` counts the processor's time and not the wall's (with one thread: OMP_NUM_THREADS=1).

`--vit` does the same to a vision tower with random weights: attention, and everything else that is merged once, is in it. Its
loop keeps the merged weights of all images for the backward pass, 227 MB for each, and on Linux CPUs the holes between them several
times that; it takes 2 images at a time there.
"""

import argparse
import copy
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from rounds import CLOCKS, finish, ratios, write_json
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP

from peft_moe_merge.tuners.wemoe import WEMoEConfig
from peft_moe_merge.tuners.wemoe.layer import WEMoEBlock, WEMoELinear, WEMoEStatic


class Loop(nn.Module):
    """The plain per-sample loop, on the weights, whole task vectors and router of a block."""

    def __init__(self, block: WEMoEBlock, adapter: str) -> None:
        super().__init__()
        self.router = copy.deepcopy(block.wemoe_router[adapter]).requires_grad_()
        self.mlp = CLIPMLP(block.base_layer.config)
        deltas = {}
        for path, linear in block.linears.items():
            self.mlp.set_submodule(path, linear.base_layer)
            deltas |= {f"{path}.weight": linear.wemoe_delta[adapter], f"{path}.bias": linear.wemoe_bias[adapter]}
        self.task_vectors = [
            {name: delta[task] for name, delta in deltas.items()} for task in range(len(deltas["fc1.bias"]))
        ]

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        outputs = []
        for x_SH, gates_T in zip(x_BSH, self.router(x_BSH), strict=True):
            merged = dict(self.mlp.named_parameters())
            for gate, task_vector in zip(gates_T, self.task_vectors, strict=True):
                for name, delta in task_vector.items():
                    merged[name] = merged[name] + gate * delta
            outputs.append(torch.func.functional_call(self.mlp, merged, (x_SH,)))
        return torch.stack(outputs)


def blocks(configs: dict[str, WEMoEConfig], width: int, seed: int) -> dict[str, nn.Module]:
    """Return a block for each configuration, of the same weights, routers and task vectors, its loop and the plain MLP.

    The first configuration has whole task vectors, which the loop shares.
    """
    ours = {}
    for name, config in configs.items():
        torch.manual_seed(seed)
        mlp = CLIPMLP(SimpleNamespace(hidden_act="quick_gelu", hidden_size=width, intermediate_size=4 * width))
        ours[name] = WEMoEBlock(mlp.requires_grad_(False))
        ours[name].update_layer("default", config)
        for linear in ours[name].linears.values():
            fill(linear, "default", config, torch.Generator().manual_seed(seed))
    loop = Loop(next(iter(ours.values())), "default")
    return {"loop": loop, **ours, "plain": loop.mlp}


class Tower(nn.Module):
    """A vision tower with one of its adapters, if it has any."""

    def __init__(self, tower: nn.Module, adapter: str | None = None, at_a_time: int | None = None) -> None:
        super().__init__()
        self.tower, self.adapter, self.at_a_time = tower, adapter, at_a_time

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.adapter is not None:
            self.tower.set_adapter(self.adapter)
        return self.tower(pixel_values=pixels.detach()).pooler_output  # images need no gradients, what is trained does


def build_tower(width: int, layers: int, seed: int) -> CLIPVisionModel:
    torch.manual_seed(seed)
    size = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = CLIPVisionConfig(**size, num_attention_heads=width // 64, patch_size=32, image_size=224)
    return CLIPVisionModel(config).eval().requires_grad_(False)


def towers(configs: dict[str, WEMoEConfig], width: int, layers: int, seed: int) -> dict[str, Tower]:
    """Return the loop, an adapter for each configuration, all on one base, and the plain tower.

    The first configuration has whole task vectors, which the loop shares.
    """
    plain, looped = build_tower(width, layers, seed), build_tower(width, layers, seed)
    outside = {name.rpartition(".")[0] for name, _ in plain.named_parameters() if ".mlp." not in name}
    static = [name for name in outside if not any(name.startswith(f"{other}.") for other in outside)]
    for number, config in enumerate(configs.values()):
        config.static_modules = static
        if number == 0:
            model = PeftModel(build_tower(width, layers, seed), config, "way0")
        else:
            model.add_adapter(f"way{number}", config)
        for place, layer in enumerate(model.modules()):
            generator = torch.Generator().manual_seed(place)
            if isinstance(layer, WEMoELinear):
                fill(layer, f"way{number}", config, generator)
            elif isinstance(layer, WEMoEStatic):
                for path, parameter in layer.base_layer.named_parameters():
                    layer.set_shift(f"way{number}", path, 1e-3 * torch.randn(parameter.shape, generator=generator))
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, WEMoEBlock):
            looped.set_submodule(path, Loop(layer, "way0"))
        elif isinstance(layer, WEMoEStatic):
            for part, parameter in looped.get_submodule(path).named_parameters():
                parameter += layer.wemoe_static["way0"][part.replace(".", "/")]
    # A parameter at the tower's entry, for which a backward pass goes through all of it, as it does for the first router.
    next(p for name, p in plain.named_parameters() if name.endswith("class_embedding")).requires_grad_()
    ours = {name: Tower(model, f"way{number}") for number, name in enumerate(configs)}
    return {"loop": Tower(looped, at_a_time=2), **ours, "plain": Tower(plain)}


def fill(linear: WEMoELinear, adapter: str, config: WEMoEConfig, generator: torch.Generator) -> None:
    """Give a layer random task vectors; factors are drawn as such, for a decomposition would take longer than all else."""
    outputs, inputs = linear.base_layer.weight.shape
    if config.rank is None:
        deltas_TOI = 1e-3 * torch.randn(len(config.tasks), outputs, inputs, generator=generator)
        linear.set_task_vectors(adapter, config, deltas_TOI, None)
    else:
        for factors in (linear.wemoe_down, linear.wemoe_up):
            factors[adapter].normal_(std=1e-2, generator=generator)


PHASES = ("forward", "forward with gradients recorded", "forward and backward")


def seconds(module: nn.Module, x: torch.Tensor, phase: str, clock: str) -> float:
    """Take the time of a phase for `x`, tokens or pixels; memory decides in how many parts a backward pass is done."""
    at_a_time = getattr(module, "at_a_time", None) if phase != "forward" else None
    start = CLOCKS[clock]()
    with torch.set_grad_enabled(phase != "forward"):
        for part in x.split(at_a_time or len(x)):
            output = module(part.detach().requires_grad_(phase != "forward"))
            if phase == "forward and backward":
                output.sum().backward()
    finish()
    return CLOCKS[clock]() - start


def measure(
    contestants: dict[str, nn.Module], x_BSH: torch.Tensor, phase: str, rounds: int, clock: str
) -> dict[str, dict]:
    """Return median milliseconds, how many times the plain model each one takes, and how many times faster than the loop it is."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, module in contestants.items():
            elapsed = seconds(module, x_BSH, phase, clock)
            if turn > 0:  # the first turn warms up
                times[name].append(elapsed)
    faster = {name: ratios(times["loop"], own) for name, own in times.items()}
    plain = {name: ratios(own, times["plain"]) for name, own in times.items()}
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "times_plain": statistics.median(plain[name]),
            "times_plain_range": [min(plain[name]), max(plain[name])],
            "faster_than_loop": statistics.median(faster[name]),
            "faster_than_loop_range": [min(faster[name]), max(faster[name])],
        }
        for name in contestants
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vit", action="store_true", help="a whole vision tower, in place of an MLP block")
    parser.add_argument("--layers", type=int, default=12, help="of the vision tower")
    parser.add_argument("--images", type=int, help="default: 16, with --vit 64")
    parser.add_argument("--tokens", type=int, nargs="+", default=[50])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="width 192, 2 layers and 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.width, args.layers, args.rounds = 192, 2, 3
    args.images = args.images or (64 if args.vit else 16)

    torch.manual_seed(args.seed)
    tasks = [str(task) for task in range(args.tasks)]
    configs = {
        "dense": WEMoEConfig(tasks=tasks),
        f"sparse {args.sparsity:g}": WEMoEConfig(tasks=tasks, sparsity=args.sparsity),
        f"rank {args.rank}": WEMoEConfig(tasks=tasks, rank=args.rank),
        f"rank {args.rank}, linear router": WEMoEConfig(tasks=tasks, rank=args.rank, router_depth=1),
    }
    if args.vit:
        contestants = towers(configs, args.width, args.layers, args.seed)
        inputs = {"ViT-B/32": torch.randn(args.images, 3, 224, 224)}
    else:
        contestants = blocks(configs, args.width, args.seed)
        inputs = {f"{tokens} tokens": torch.randn(args.images, tokens, args.width) for tokens in args.tokens}
    for module in contestants.values():
        module.to(args.device)

    results = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for what, x in inputs.items():
        x = x.to(args.device)
        with torch.no_grad():
            torch.testing.assert_close(contestants["dense"](x[:2]), contestants["loop"](x[:2]), rtol=1e-4, atol=1e-4)
        for phase in PHASES:
            results[f"{what}, {phase}"] = rows = measure(contestants, x, phase, args.rounds, args.clock)
            print(
                f"\n{what}, {phase} ({args.images} images, {args.tasks} tasks, width {args.width}, "
                f"{results['threads']} threads)",
                flush=True,
            )
            for name, row in rows.items():
                low, high = row["times_plain_range"]
                print(
                    f"  {name:24s}{row['milliseconds']:9.1f} ms  {row['times_plain']:6.2f} x plain "
                    f"({low:.2f} to {high:.2f})  {row['faster_than_loop']:6.2f} x the loop",
                    flush=True,
                )
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
