"""Two ways to keep experts: parameters of their own for each, or one stacked parameter per tensor of a block.

    OMP_NUM_THREADS=1 python benchmarks/bank_designs.py --output runs/bank_designs.json
    python benchmarks/bank_designs.py --quick

A stack of blocks, each a linear layer with low-rank experts beside it, two of which a sample takes at random. The banks are
plain, written here; the arithmetic of both is the same, and so are outputs and gradients.

- apart: a parameter per expert and tensor, as the tuner has it. The host asks which experts were chosen, and stacks those.
- stacked: one parameter E x R x D; chosen experts are gathered. The gradient of all others is zero.
- kept: stacked, and after the optimizer's step experts that nobody chose are put back, and so is their state. That makes it
  exact: an optimizer moves what has a gradient of zero too, by its momentum and by weight decay.

Measured, in turns within each round: forward and backward pass, optimizer step (fused or foreach), both by the processor's time;
the parameters and bytes of the optimizer's state; how many experts that nobody chose in a step moved in it; graphs that
`torch.compile` makes of a step of training; adding experts for one more task; and, in two processes over gloo, a DDP step and one
under FSDP2, each block sharded, with the same experts chosen in both.
"""

import argparse
import os
import socket
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from rounds import ratios, take_turns, write_json
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

DESIGNS = ("apart", "stacked", "kept")
TOP_K, RANK, BLOCKS, TOKENS = 2, 16, 12, 16


def not_chosen(indices_BK: Tensor, experts: int) -> Tensor:
    """Tell which experts no sample takes: BoolTensor[E]."""
    return torch.ones(experts, dtype=torch.bool).index_fill_(0, indices_BK.flatten(), False)


class Block(nn.Module, ABC):
    """A linear layer with experts. Subclasses keep them, as `down` E x R x D and `up` E x R x D."""

    def __init__(self, width: int):
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)

    @abstractmethod
    def chosen(self, indices_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts that each sample takes, each B x K R x D."""

    def forward(self, x_BLD: Tensor, indices_BK: Tensor) -> Tensor:
        down_BHD, up_BHD = self.chosen(indices_BK)
        hidden_BLH = torch.bmm(x_BLD, down_BHD.transpose(1, 2)).relu()
        return self.base(x_BLD) + torch.bmm(hidden_BLH, up_BHD) / TOP_K


class Apart(Block):
    def __init__(self, width: int, down_ERD: Tensor, up_ERD: Tensor):
        super().__init__(width)
        self.down = nn.ParameterList(map(nn.Parameter, down_ERD.clone().unbind()))
        self.up = nn.ParameterList(map(nn.Parameter, up_ERD.clone().unbind()))

    def chosen(self, indices_BK: Tensor) -> tuple[Tensor, Tensor]:
        taken_E = torch.zeros(len(self.down), dtype=torch.bool).scatter_(0, indices_BK.flatten(), True)
        position_BK = (taken_E.cumsum(0) - 1)[indices_BK]
        experts = [expert for expert, taken in enumerate(taken_E.tolist()) if taken]
        stacks = (torch.stack([getattr(bank, str(e)) for e in experts]) for bank in (self.down, self.up))
        return tuple(
            stack.index_select(0, position_BK.flatten()).view(len(indices_BK), -1, stack.shape[2]) for stack in stacks
        )

    def add(self, experts: int) -> None:
        for bank in (self.down, self.up):
            like = getattr(bank, "0")
            for _ in range(experts):
                bank.append(nn.Parameter(torch.zeros_like(like)))


class Stacked(Block):
    def __init__(self, width: int, down_ERD: Tensor, up_ERD: Tensor):
        super().__init__(width)
        self.down, self.up = nn.Parameter(down_ERD.clone()), nn.Parameter(up_ERD.clone())

    def chosen(self, indices_BK: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(
            bank.index_select(0, indices_BK.flatten()).view(len(indices_BK), -1, bank.shape[2])
            for bank in (self.down, self.up)
        )

    def add(self, experts: int) -> None:
        for name in ("down", "up"):
            bank = getattr(self, name)
            setattr(self, name, nn.Parameter(torch.cat([bank.detach(), bank.new_zeros(experts, *bank.shape[1:])])))


class Blocks(nn.Module):
    """The same blocks in one of the designs."""

    def __init__(self, design: str, experts: int, width: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        make = Apart if design == "apart" else Stacked
        self.blocks = nn.ModuleList(
            make(width, *(0.02 * torch.randn(experts, RANK, width, generator=generator) for _ in range(2)))
            for _ in range(BLOCKS)
        )

    def forward(self, x_BLD: Tensor, indices_NBK: Tensor) -> Tensor:
        for block, indices_BK in zip(self.blocks, indices_NBK, strict=True):
            x_BLD = block(x_BLD, indices_BK)
        return x_BLD

    def experts(self) -> list[Tensor]:
        """All experts, block by block, E x 2 R D each."""
        stacks = [
            [torch.stack(list(b)) if isinstance(b, nn.ParameterList) else b for b in (x.down, x.up)]
            for x in self.blocks
        ]
        return [torch.cat([tensor.detach().flatten(1) for tensor in of_block], dim=1) for of_block in stacks]


def batch_of(experts: int, width: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw inputs, and the experts that each sample takes in each block."""
    generator = torch.Generator().manual_seed(seed)
    indices_NBK = torch.rand(BLOCKS, batch_size, experts, generator=generator).argsort(dim=-1)[..., :TOP_K]
    return torch.randn(batch_size, TOKENS, width, generator=generator), indices_NBK


class Contestant:
    """A design with its optimizer."""

    def __init__(self, design: str, kind: str, experts: int, width: int):
        self.design, self.model = design, Blocks(design, experts, width)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, **{kind: True})

    def step(self, x_BLD: Tensor, indices_NBK: Tensor) -> dict[str, float]:
        """Take a training step; return the processor's seconds of its parts."""
        began = time.process_time()
        self.model(x_BLD, indices_NBK).square().mean().backward()
        passed = time.process_time()
        if self.design == "kept":
            self._step_and_put_back(indices_NBK)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        stepped = time.process_time()
        return {"passes": passed - began, "optimizer": stepped - passed, "step": stepped - began}

    @torch.no_grad()
    def _step_and_put_back(self, indices_NBK: Tensor) -> None:
        kept = []
        for block, indices_BK in zip(self.model.blocks, indices_NBK, strict=True):
            left_E = not_chosen(indices_BK, len(block.down))
            for parameter in (block.down, block.up):
                state = self.optimizer.state.get(parameter, {})
                tensors = [parameter, *(state[name] for name in ("exp_avg", "exp_avg_sq") if name in state)]
                kept += [(tensor, left_E, tensor[left_E]) for tensor in tensors]
        self.optimizer.step()
        for tensor, left_E, before in kept:
            tensor[left_E] = before

    def state_bytes(self) -> int:
        """Add up the optimizer's state."""
        return sum(
            t.nbytes for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)
        )


def moved(contestant: Contestant, x_BLD: Tensor, indices_NBK: Tensor) -> int:
    """Count the experts that nobody chose and that a step moved all the same."""
    before = contestant.model.experts()
    contestant.step(x_BLD, indices_NBK)
    count = 0
    for old, new, indices_BK in zip(before, contestant.model.experts(), indices_NBK, strict=True):
        count += int((old != new).any(dim=1)[not_chosen(indices_BK, len(old))].sum())
    return count


def graphs(design: str, experts: int, width: int, batch: tuple[Tensor, Tensor]) -> int:
    """Count the graphs that the compiler makes of a forward pass of training."""
    torch._dynamo.reset()
    return torch._dynamo.explain(Blocks(design, experts, width))(*batch).graph_count


def parallel_worker(rank: int, port: int, how: str, design: str, size: tuple[int, int], results: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = Blocks(design, *size)
    if how == "ddp":
        # experts that a process has not chosen have no gradient there, which DDP has to be told to look for
        called = DistributedDataParallel(model, find_unused_parameters=design == "apart")
    else:
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        called = model
    seconds = []
    for step in range(6):
        # sharded, both processes take the same experts: FSDP2 waits for gradients that are in one of them alone
        batch = batch_of(*size, 8, seed=10 * step + (rank if how == "ddp" else 0))
        began = time.process_time()
        called(*batch).square().mean().backward()
        seconds.append(time.process_time() - began)
        model.zero_grad()
    if rank == 0:
        results.put(statistics.median(seconds[1:]))
    dist.barrier()  # gloo's threads of one process still work for the other
    dist.destroy_process_group()


def parallel_seconds(how: str, design: str, size: tuple[int, int]) -> float:
    """Measure the passes of a DDP or FSDP2 step in the first of two processes; `size` is experts and width."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(parallel_worker, (port, how, design, size, results), nprocs=2)
    return results.get()


def adding(design: str, experts: int, width: int) -> float:
    """Measure what two more experts in every block take."""
    model = Blocks(design, experts, width)
    began = time.process_time()
    for block in model.blocks:
        block.add(TOP_K)
    return time.process_time() - began


def compare(
    experts: int, width: int, batch_size: int, rounds: int, parallel: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Measure all designs with both optimizers."""
    rows: dict[str, dict[str, float]] = {}
    for kind in ("fused", "foreach"):
        contestants = {design: Contestant(design, kind, experts, width) for design in DESIGNS}

        def turn(one: Contestant, seeds: Iterator[int]) -> dict[str, float]:
            return one.step(*batch_of(experts, width, batch_size, next(seeds)))

        turns = {design: partial(turn, one, iter(range(10**6))) for design, one in contestants.items()}
        seconds = take_turns(turns, rounds, f"{experts} experts, {kind}")
        for design, one in contestants.items():
            row = {name: 1e3 * statistics.median(values) for name, values in seconds[design].items()}
            row["over_apart"] = statistics.median(ratios(seconds[design]["step"], seconds["apart"]["step"]))
            row["parameters"] = sum(parameter.requires_grad for parameter in one.model.parameters())
            row["state_bytes"] = one.state_bytes()
            row["moved"] = moved(one, *batch_of(experts, width, batch_size, seed=1))
            rows[f"{design}, {kind}"] = row
    batch = batch_of(experts, width, batch_size, seed=0)
    for design in DESIGNS[:2]:
        rows[f"{design}, fused"] |= {
            "graphs": graphs(design, experts, width, batch),
            "adding": 1e3 * min(adding(design, experts, width) for _ in range(3)),
            **{how: 1e3 * parallel_seconds(how, design, (experts, width)) for how in parallel},
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[22, 220])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--parallel", nargs="*", choices=("ddp", "fsdp"), default=["ddp", "fsdp"], help="two processes"
    )
    parser.add_argument("--output", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="8 experts of width 32, 2 rounds, one process")
    args = parser.parse_args()
    if args.quick:
        args.experts, args.width, args.batch_size, args.rounds, args.parallel = [8], 32, 4, 2, []
    torch.set_num_threads(1)
    results = {}
    for experts in args.experts:
        results[str(experts)] = rows = compare(experts, args.width, args.batch_size, args.rounds, args.parallel)
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = Table(f"{experts} experts", *names)
        for design, row in rows.items():
            table.add_row(design, *(f"{row[name]:.4g}" if name in row else "" for name in names))
        Console(width=150).print(table)
    if args.output:
        settings = {name: str(value) for name, value in vars(args).items()}
        write_json(args.output, {"settings": settings, "measured": results})


if __name__ == "__main__":
    main()
