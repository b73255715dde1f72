"""Several processes, and parameters of which each holds a part."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def several_processes() -> bool:
    """Tell whether others train the same model beside this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_say(answers: list[bool], device: torch.device) -> list[bool]:
    """Tell, question by question, whether all processes say yes. With several processes all of them must call."""
    if not several_processes():
        return answers
    yes = torch.tensor(answers, dtype=torch.int64, device=device)
    dist.all_reduce(yes, op=dist.ReduceOp.MIN)
    return yes.bool().tolist()


def as_in_first_process(tensor: Tensor) -> None:
    """Overwrite a whole tensor that each process drew for itself by that of the first one. All processes must call."""
    if several_processes():
        dist.broadcast(tensor, src=0)


def is_sharded(parameter: Tensor) -> bool:
    """Tell whether this process holds only a part of the parameter (a `DTensor`, as FSDP makes them)."""
    return hasattr(parameter, "full_tensor")


def gathered(parameter: Tensor) -> Tensor:
    """Return a parameter without gradient; one that is sharded is put together, for which all processes must call."""
    return parameter.detach().full_tensor() if is_sharded(parameter) else parameter.detach()


def overwrite(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a whole tensor that is the same in all processes."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor  # not in every build of torch

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


class ZeroGradients(torch.autograd.Function):
    """Hands on its first argument; the others get gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def in_backward() -> bool:
    """Tell whether a backward pass is under way, so that this forward pass recomputes an earlier one."""
    return torch._C._current_graph_task_id() != -1
