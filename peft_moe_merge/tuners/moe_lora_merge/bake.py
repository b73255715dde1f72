"""One task by itself: as a slim model, or as an ordinary LoRA.

Shapes: D input width, C experts that a router knows.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from .routers import RouterBank

if TYPE_CHECKING:
    from .model import MoELoraMergeModel


def bake_task(tuner: MoELoraMergeModel, task: str) -> PeftModel:
    """Make a slim model for one task: its router, and only the experts that it can still choose.

    An expert whose router column is zero, since training never selected it, always scores zero; between equal scores
    the lower index wins, so only the first `top_k` of these can ever be chosen and the others go. The outputs stay
    the same. All blocks keep the same number of experts, that of the block which needs the most.

    Returns:
        A `PeftModel` of its own, in inference mode, with its own copy of the base model and an adapter "default";
        save it by `save_pretrained`.

    Raises:
        ValueError: there is no such task.
    """
    (adapter_name,) = tuner.active_adapters
    config = tuner.peft_config[adapter_name]
    index = config.task_index(task)
    routers, banks = tuner.router_banks(), tuner.expert_banks()
    columns = {name: choosable_columns(router, index, config.top_k) for name, router in routers.items()}
    if config.stores_columns:  # all blocks keep as many columns as that which needs the most
        width = max(map(len, columns.values()))
        for name, router in routers.items():
            others = [column for column in range(len(router.experts_of(index))) if column not in columns[name]]
            columns[name] = sorted(columns[name] + others[: width - len(columns[name])])
    kept = {
        name: sorted({router.experts_of(index)[column] for column in columns[name]})
        for name, router in routers.items()
    }
    fewest = config.experts_per_task if config.task_experts == "reserved" else config.top_k
    num_experts = max(fewest, *(len(experts) for experts in kept.values()))
    for name, experts in kept.items():
        others = [expert for expert in range(len(banks[name])) if expert not in experts]
        experts[:] = sorted(experts + others[: num_experts - len(experts)])
        if not config.stores_columns:  # every router knows all experts
            columns[name] = experts

    baked_config = copy.copy(config)
    baked_config.tasks, baked_config.current_task, baked_config.num_experts = [task], task, num_experts
    baked_config.max_experts = baked_config.pool_size = None
    baked_config.inference_mode = True
    baked_config.task_selector = baked_config.selector = None  # there is nothing left to choose
    if config.task_experts == "reserved":
        baked_config.router_widths = [len(next(iter(columns.values())))]
    else:
        baked_config.router_widths = None
    baked = get_peft_model(_plain_copy(tuner), baked_config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, layer in baked.base_model.adapted_layers().items():
            bank = layer.moe_lora_experts["default"].to(banks[name].dtype)
            router = layer.moe_lora_routers["default"].to(routers[name].weight[index].dtype)
            for new, old in enumerate(kept[name]):
                for parameter, source in zip(bank.parameters_of(new), banks[name].parameters_of(old), strict=True):
                    parameter.copy_(source)
            counted = columns[name] if router.counts_columns else kept[name]
            router.usage.copy_(routers[name].usage[index, counted])
            bank.frozen.copy_(banks[name].frozen[kept[name]])
            if router.columns is not None:
                known = [routers[name].experts_of(index)[column] for column in columns[name]]
                router.columns.set(0, [kept[name].index(expert) for expert in known])
            for parameter, source in zip(router.parameters_of(0), routers[name].parameters_of(index), strict=True):
                parameter.copy_(source[:, columns[name]])
    _copy_saved_modules(tuner.model, adapter_name, baked.base_model.model)
    return baked


def export_lora(tuner: MoELoraMergeModel, task: str) -> PeftModel:
    """Make an ordinary LoRA of one task, which PEFT loads without this package and merges into the base weights.

    It is exact where the task has one linear expert per layer: with expert_activation="identity" and
    experts_per_task=top_k=1, or where all its experts have been merged into one.

    Returns:
        A `PeftModel` with its own copy of the base model and a LoRA adapter "default"; save it by `save_pretrained`, or
        `merge_and_unload()` it.

    Raises:
        ValueError: there is no such task, or it is no LoRA, for the reason that is given.
    """
    (adapter_name,) = tuner.active_adapters
    config = tuner.peft_config[adapter_name]
    index = config.task_index(task)
    if config.expert_activation != "identity":
        raise ValueError(
            f"Task {task!r} is no LoRA: its experts have expert_activation={config.expert_activation!r}, only 'identity' "
            "makes them linear. `bake_task` gives a slim model of any task."
        )
    lora: dict[str, int] = {}
    for name, layer in tuner.adapted_layers().items():
        experts = set(layer.moe_lora_routers[adapter_name].experts_of(index))
        if not isinstance(layer.get_base_layer(), nn.Linear) or len(experts) != 1:
            what = f"{len(experts)} experts" if len(experts) != 1 else "a whole MLP block"
            raise ValueError(
                f"Task {task!r} is no LoRA: beside {name!r} stand {what}, a LoRA has one update beside each linear layer. "
                "Train with experts_per_task=1, top_k=1 and linear layers in `target_modules`, or use `bake_task`."
            )
        (lora[name],) = experts
    lora_config = LoraConfig(
        r=config.r,
        lora_alpha=config.scaling * config.r,
        target_modules=list(lora),
        modules_to_save=config.modules_to_save,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    exported = get_peft_model(_plain_copy(tuner), lora_config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, expert in lora.items():
            tensors: dict[str, Tensor] = tuner.expert_banks()[name].expert(expert)
            layer = exported.base_model.model.get_submodule(name)
            for matrix, value in ((layer.lora_A, tensors["down_weight"]), (layer.lora_B, tensors["up_weight"].T)):
                matrix["default"].to(value.dtype).weight.copy_(value)
    _copy_saved_modules(tuner.model, adapter_name, exported.base_model.model)
    return exported


def choosable_columns(router: RouterBank, task: int, top_k: int) -> list[int]:
    """List the columns that a router can choose for some input: all but the zero ones after the first `top_k` of them."""
    weight_DC = router.weight[task].detach()
    zero = [column for column, learnt in enumerate(weight_DC.any(dim=0).tolist()) if not learnt]
    return [column for column in range(weight_DC.shape[1]) if column not in zero[top_k:]]


def _plain_copy(tuner: MoELoraMergeModel) -> nn.Module:
    return copy.deepcopy(tuner).unload()


def _copy_saved_modules(model: nn.Module, adapter_name: str, into: nn.Module) -> None:
    """Copy the modules that an adapter trains and saves whole. Other adapters may have others."""
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            saved = into.get_submodule(name).modules_to_save["default"]
            saved.load_state_dict(module.modules_to_save[adapter_name].state_dict())
