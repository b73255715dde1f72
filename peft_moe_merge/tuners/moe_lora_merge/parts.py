"""An adapter task by task: what of it belongs to one task, and how it is put together again.

So a task that has ended can be written once and never again. That needs experts which nobody shares, of a pool that grows
without a bound: no merge ever changes them.

Shapes: T tasks, E experts, C columns of a router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from peft_moe_merge.files import read_tensors

from .config import MoELoraMergeConfig
from .distributed import gathered

if TYPE_CHECKING:
    from .model import MoELoraMergeModel

EXPERTS, ROUTERS = "moe_lora_experts", "moe_lora_routers"


def comes_in_parts(config: MoELoraMergeConfig) -> bool:
    """Tell whether every task has experts that no other task ever knows, in the order of the tasks."""
    own = config.task_experts == "reserved" and config.num_experts == "grow" and config.merge_at == "pool_full"
    return own and config.max_experts is None and not config.modules_to_save


def part_of(tuner: MoELoraMergeModel, task: str) -> dict[str, Tensor]:
    """Return all that an adapter holds of one task, by the names of an adapter file.

    Of what such a file holds once for all tasks, `usage` T x C, `stopped` T and `frozen` E, it is the task's rows.
    """
    (adapter_name,) = tuner.active_adapters
    index, part = tuner.peft_config[adapter_name].task_index(task), {}
    for block, layer in tuner.adapted_layers().items():
        bank, routers = layer.moe_lora_experts[adapter_name], layer.moe_lora_routers[adapter_name]
        experts, of_routers = (f"base_model.model.{block}.{container}" for container in (EXPERTS, ROUTERS))
        own = routers.experts_of(index)
        for expert in own:
            for name, tensor in bank.expert(expert).items():
                part[f"{experts}.{name}.{expert}"] = tensor
        part[f"{experts}.frozen"] = bank.frozen[own]
        for name, parameter in zip(("weight", "noise_weight"), routers.parameters_of(index), strict=False):
            part[f"{of_routers}.{name}.{index}"] = gathered(parameter)
        part[f"{of_routers}.columns.{index}"] = routers.columns[index]
        part[f"{of_routers}.usage"] = routers.usage[index : index + 1]
        part[f"{of_routers}.stopped"] = routers.stopped[index : index + 1]
    return part


def joined_parts(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the parts of all tasks, in order, together to what an adapter file would hold."""
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, tensor in part.items():
            found.setdefault(name, []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in found.items()}


def load_parts(model: nn.Module, config: MoELoraMergeConfig, files: Iterable[Path]) -> PeftModel:
    """Put an adapter on a model from the parts of its tasks, to go on training it.

    Args:
        model: the base model.
        config: of the adapter.
        files: one safetensors file a task, in order.

    Raises:
        ValueError: a file is damaged, or they are not the parts of this adapter.
    """
    config.inference_mode = False
    adapted = get_peft_model(model, config)
    set_peft_model_state_dict(adapted, joined_parts(map(read_tensors, files)))
    return adapted
