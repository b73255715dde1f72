"""Models that are whole between tasks and in parts while a task trains (FSDP2)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from peft_moe_merge.tuners.moe_lora_merge.distributed import gathered

from .methods.base import Method


@contextmanager
def sharded_copy(method: Method, accelerator: Accelerator) -> Iterator[None]:
    """Under FSDP2, let a copy of the method's model be trained, which may be sharded; its own then gets what that has learnt.

    Tasks add parameters, which a sharded model does not take, and testing and saving want whole models. Meanwhile the whole
    model waits in the host's memory. Without FSDP there is nothing to do. All processes must call.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        yield
        return
    device = next(method.model.parameters()).device
    whole = method.model.cpu()
    method.model = _to_shard(copy.deepcopy(whole))
    try:
        yield
        own, learnt = whole.state_dict(), method.model.state_dict()
        whole.load_state_dict({name: gathered(learnt[name]).reshape(own[name].shape).cpu() for name in learnt})
    finally:
        method.model = whole.to(device)


def _to_shard(model: nn.Module) -> nn.Module:
    """Change what FSDP2 can't take: scalars become vectors of one number, and CLIP, asked for its embeddings, has none to tell.

    Accelerate would shard these apart, and `CLIPModel`, which has two kinds, raises an error when it is asked.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                vector = nn.Parameter(parameter.detach().reshape(1), requires_grad=parameter.requires_grad)
                setattr(module, name, vector)
    model.get_input_embeddings = lambda: None
    return model
