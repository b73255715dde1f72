"""Per-sample forward and backward passes of one WEMoE block, side by side with a plain loop over the images.

    python benchmarks/wemoe_forward.py                  # one ViT-B/32 MLP block, 8 tasks, 16 images of 50 tokens
    python benchmarks/wemoe_forward.py --quick          # a narrow block, seconds
    python benchmarks/wemoe_forward.py --tokens 1 10 50 # where the cost rule changes sides

The loop merges the weights of one image at a time, tensor by tensor and task by task, and runs the block on that
image, as a direct implementation of arXiv 2402.00433 does. All contestants get the same gates' router, weights and
images; they take turns in one process, and medians of times and of ratios within a turn are reported. Where others use the
cores, `--clock cpu` counts the processor's time and not the wall's (with one thread: OMP_NUM_THREADS=1).
"""

import argparse
import statistics
from pathlib import Path
from types import SimpleNamespace

import torch
from rounds import CLOCKS, ratios, write_json
from torch import nn
from transformers.models.clip.modeling_clip import CLIPMLP

from peft_moe_merge.tuners.wemoe import WEMoEConfig
from peft_moe_merge.tuners.wemoe.layer import WEMoEBlock


def build(config: WEMoEConfig, width: int, deltas: dict[str, torch.Tensor], seed: int) -> WEMoEBlock:
    """Return a block with the task vectors `deltas`, and the same weights and router for the same seed."""
    torch.manual_seed(seed)
    mlp = CLIPMLP(SimpleNamespace(hidden_act="quick_gelu", hidden_size=width, intermediate_size=4 * width))
    block = WEMoEBlock(mlp.requires_grad_(False))
    block.update_layer("default", config)
    for path, linear in block.linears.items():
        linear.set_task_vectors("default", config, deltas[f"{path}.weight"], deltas[f"{path}.bias"])
    return block


class Loop(nn.Module):
    """The plain per-sample loop, on the weights and the router of a block."""

    def __init__(self, block: WEMoEBlock, deltas: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.router = block.wemoe_router["default"]
        self.mlp = CLIPMLP(block.base_layer.config)
        for path, linear in block.linears.items():
            self.mlp.set_submodule(path, linear.base_layer)
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


PHASES = ("forward", "forward with gradients recorded", "forward and backward")


def seconds(module: nn.Module, x_BSH: torch.Tensor, phase: str, clock: str) -> float:
    start = CLOCKS[clock]()
    with torch.set_grad_enabled(phase != "forward"):
        output = module(x_BSH.detach().requires_grad_(phase != "forward"))
        if phase == "forward and backward":
            output.sum().backward()
    if x_BSH.is_cuda:
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def measure(
    contestants: dict[str, nn.Module], x_BSH: torch.Tensor, phase: str, rounds: int, clock: str
) -> dict[str, dict]:
    """Return median milliseconds, how many plain MLPs each one costs, and how many times faster than the loop it is."""
    times = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, module in contestants.items():
            elapsed = seconds(module, x_BSH, phase, clock)
            if turn > 0:  # the first turn warms up
                times[name].append(elapsed)
    faster = {name: ratios(times["loop"], own) for name, own in times.items()}
    plain = {name: ratios(own, times["plain MLP"]) for name, own in times.items()}
    return {
        name: {
            "milliseconds": 1e3 * statistics.median(times[name]),
            "plain_mlps": statistics.median(plain[name]),
            "plain_mlps_range": [min(plain[name]), max(plain[name])],
            "faster_than_loop": statistics.median(faster[name]),
            "faster_than_loop_range": [min(faster[name]), max(faster[name])],
        }
        for name in contestants
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--tokens", type=int, nargs="+", default=[50])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="width 192 and 3 rounds")
    args = parser.parse_args()
    if args.quick:
        args.width, args.rounds = 192, 3

    torch.manual_seed(args.seed)
    tasks = [str(task) for task in range(args.tasks)]
    wide = 4 * args.width
    shapes = {
        "fc1.weight": (wide, args.width),
        "fc1.bias": (wide,),
        "fc2.weight": (args.width, wide),
        "fc2.bias": (args.width,),
    }
    deltas = {name: 1e-3 * torch.randn(args.tasks, *shape) for name, shape in shapes.items()}
    configs = {
        "dense": WEMoEConfig(tasks=tasks),
        f"sparse {args.sparsity:g}": WEMoEConfig(tasks=tasks, sparsity=args.sparsity),
        f"rank {args.rank}": WEMoEConfig(tasks=tasks, rank=args.rank),
        f"rank {args.rank}, linear router": WEMoEConfig(tasks=tasks, rank=args.rank, router_depth=1),
    }
    ours = {name: build(config, args.width, deltas, args.seed).to(args.device) for name, config in configs.items()}
    deltas = {name: delta.to(args.device) for name, delta in deltas.items()}
    loop = Loop(ours["dense"], deltas)
    contestants = {"loop": loop, **ours, "plain MLP": loop.mlp}

    results = {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for tokens in args.tokens:
        x_BSH = torch.randn(args.images, tokens, args.width, device=args.device)
        with torch.no_grad():
            torch.testing.assert_close(ours["dense"](x_BSH), loop(x_BSH), rtol=1e-4, atol=1e-4)
        for phase in PHASES:
            results[f"{tokens} tokens, {phase}"] = rows = measure(contestants, x_BSH, phase, args.rounds, args.clock)
            print(
                f"\n{phase} ({args.images} images, {args.tasks} tasks, width {args.width}, {results['threads']} threads)"
            )
            for name, row in rows.items():
                low, high = row["plain_mlps_range"]
                print(
                    f"  {name:24s}{row['milliseconds']:9.1f} ms  {row['plain_mlps']:6.2f} plain MLPs "
                    f"({low:.2f} to {high:.2f})  {row['faster_than_loop']:6.2f} x the loop"
                )
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
