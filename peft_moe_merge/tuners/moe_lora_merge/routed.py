"""How a call reaches the experts: the adapted model, and its blocks, become members of a subclass of their own class.

So `task_ids` is an argument like any other, which a `Trainer` sees in the signature; what a call decides is set when it
begins and gone when it ends; and copies of the model, data parallel replicas among them, call their own methods. FSDP2 does
the same to the modules that it shards.
"""

from __future__ import annotations

import functools
import gc
import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_moe_merge.selection.features import FeatureSource

from .config import MoELoraMergeConfig, check_selector
from .context import Adapters, Record, RoutingContext, TaskIds, context_under_way, keep_record, routing
from .distributed import is_sharded, several_processes
from .layer import MLP, MoELoraMergeLayer


class Routable:
    """A module whose class has been replaced by a subclass that knows of routing.

    Attributes:
        moe_lora_adapters: what it shares with the layers of its tuner.
        moe_lora_parts: its own class, and what was added to it.
    """

    moe_lora_adapters: Adapters
    moe_lora_parts: tuple[type[nn.Module], tuple[type, ...]]

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        # Who calls the class, `type(clip)(config)`, wants a new model, which has no experts.
        return cls.moe_lora_parts[0](*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is made in each process anew, so pickle can't find it by its name.
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, self.moe_lora_parts, *state


def _blank(cls: type[nn.Module], parts: tuple[type, ...]) -> nn.Module:
    made = _routed_class(cls, parts)
    return made.__new__(made)


@functools.cache
def _routed_class(cls: type[nn.Module], parts: tuple[type, ...]) -> type[nn.Module]:
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "moe_lora_parts": (cls, parts),
    }
    if any(issubclass(part, RoutedModel) for part in parts):
        namespace["forward"] = _with_task_ids(cls.forward)
    return type(cls.__name__, (*parts, Routable, cls), namespace)


def _with_task_ids(forward: Any) -> Any:
    """Make the forward method of a `RoutedModel`, whose signature is that of its own class and one more argument."""
    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(at, inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None))

    @functools.wraps(forward)
    def routed_forward(self: RoutedModel, *args: Any, task_ids: Tensor | None = None, **kwargs: Any) -> Any:
        return self.routed_call(args, kwargs, task_ids)

    routed_forward.__signature__ = signature.replace(parameters=parameters)
    return routed_forward


def make_routable(module: nn.Module, adapters: Adapters, *parts: type) -> None:
    """Turn a module into one that knows of routing."""
    module.__class__ = _routed_class(type(module), parts)
    module.moe_lora_adapters = adapters


def restore_classes(model: nn.Module) -> None:
    """Undo `make_routable` in a whole model."""
    for module in model.modules():
        if isinstance(module, Routable):
            module.__class__ = module.moe_lora_parts[0]
            del module.moe_lora_adapters


def clear_leftovers(model: nn.Module) -> bool:
    """Take experts away that a tuner left behind, as a load that failed does. Tell whether none are left.

    Experts of a tuner that is in use stay: two of them on one model would not know of each other.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELoraMergeLayer)}
    if not all(layer.adapters.abandoned for layer in layers.values()):
        gc.collect()  # what the exception of a failed load held may be in a circle
    if not all(layer.adapters.abandoned for layer in layers.values()):
        return False
    if layers:
        for name, layer in layers.items():
            if isinstance(layer, MLP):
                layer.unhook()
            model.set_submodule(name, layer.get_base_layer())
        for name, module in list(model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                model.set_submodule(name, module.original_module)
        restore_classes(model)
        if hasattr(model, "peft_config"):  # missing where the load failed before it was set
            del model.peft_config
    return True


def inputs_of(module: Routable, method: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call of one of the module's own methods, but those that are None."""
    inputs = _signature(module.moe_lora_parts[0], method).bind_partial(module, *args, **kwargs).arguments
    further = inputs.pop("kwargs", {})
    return {name: value for name, value in {**inputs, **further}.items() if name != "self" and value is not None}


@functools.cache
def _signature(cls: type, method: str) -> inspect.Signature:
    return inspect.signature(getattr(cls, method))


class RoutedBlock:
    """A transformer block that hands the context of its call on to its recomputation under gradient checkpointing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, moe_lora_context=context_under_way(), **kwargs)

    def forward(self, *args: Any, moe_lora_context: RoutingContext | None = None, **kwargs: Any) -> Any:
        with routing(moe_lora_context):
            return super().forward(*args, **kwargs)


class RoutedModel:
    """The adapted model as a whole: every call of it has its own context."""

    # To the `Trainer`: the loss is the mean of the call's own batch, in which losses on routers have joined. It takes CLIP's
    # for one that it told the size of the whole batch, and multiplies it by the number of processes or micro-batches.
    accepts_loss_kwargs = False

    def routed_call(self, args: tuple, kwargs: dict[str, Any], task_ids: Tensor | None) -> Any:
        """Call the model's own `forward`, samples routed by `task_ids`, a selector or the current task."""
        inputs = inputs_of(self, "forward", args, kwargs)
        self._notice_sharding()
        record = Record() if self.training else None
        context = self.call_context(inputs, task_ids, record)
        with routing(context):
            output = super().forward(*args, **kwargs)
        keep_record(context)
        return output if record is None or not record.losses else join_losses(output, inputs, record)

    def route(self, task_ids: Tensor | None) -> AbstractContextManager[None]:
        """Route calls of the model's parts inside a `with` block as `task_ids` says, see `MoELoraMergeModel.route`."""
        return routing(self.call_context({}, task_ids, Record() if self.training else None))

    def call_context(
        self, inputs: Mapping[str, Any], task_ids: Tensor | None, record: Record | None = None
    ) -> RoutingContext:
        """Decide what has to be known before a call: whose router each sample takes.

        Raises:
            TypeError, ValueError: `task_ids` are not what they should be.
        """
        context = RoutingContext.of_current_tasks(self.moe_lora_adapters)
        if task_ids is None:
            task_ids = self._selected(inputs)
        ids = None if task_ids is None else TaskIds.check(task_ids, self._active_config().tasks)
        if ids is not None and {"pixel_values", "input_ids"} <= inputs.keys() and not self.routes_two_towers():
            raise ValueError(
                f"A {type(self).__name__} gets images and prompts in one call, and `task_ids` can't be for both. In a "
                "CLIPModel, or a model that contains one, they are the images'; here, call the towers one by one, or choose "
                "one task by `set_task(name)`."
            )
        return RoutingContext(context.adapters, context.current, ids, record=record)

    def routes_two_towers(self) -> bool:
        """Whether some part of the model knows which samples are images and which are prompts."""
        return any(isinstance(module, TwoTowered) for module in self.modules())

    def _active_config(self) -> MoELoraMergeConfig:
        active = first_layer(self).active_adapters
        if len(active) != 1:
            raise ValueError(
                f"`task_ids` are indexes into the tasks of one adapter, but {active or 'none'} are active: choose one by "
                "`model.set_adapter(name)`."
            )
        return self.moe_lora_adapters.configs[active[0]]

    def _selected(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Let an attached selector choose each image's task, outside of training."""
        pixels, layer = inputs.get("pixel_values"), first_layer(self)
        if self.training or pixels is None or layer.disable_adapters or len(layer.active_adapters) != 1:
            return None
        config = self._active_config()
        if config.task_selector is None:
            return None
        check_selector(config.task_selector, config.tasks)
        interpolate = inputs.get("interpolate_pos_encoding", False)
        return config.task_selector.select(self.frozen_features(config.task_selector.source, pixels, interpolate))[0]

    @torch.no_grad()
    def frozen_features(
        self, source: FeatureSource, pixel_values: Tensor, interpolate_pos_encoding: bool = False
    ) -> Tensor:
        """Compute a selector's features B x F of images, by the model without experts."""
        adapters = self.moe_lora_adapters
        with routing(RoutingContext(adapters, dict.fromkeys(adapters.configs))):
            return source(self, pixel_values, interpolate_pos_encoding)

    def _notice_sharding(self) -> None:
        # A block's parameters are whole while the block runs; whether they are sharded shows before.
        if self.training and several_processes():
            for layer in self.modules():
                if isinstance(layer, MoELoraMergeLayer):
                    for experts in layer.moe_lora_experts.values():
                        experts.sharded = is_sharded(experts.down_weight[0])


class TwoTowered:
    """A part of the model that knows which samples are images and which are prompts."""


def first_layer(model: nn.Module) -> MoELoraMergeLayer | None:
    """Return some adapted layer of a model: PEFT's flags, which adapters are active and whether, are the same on all."""
    return next((module for module in model.modules() if isinstance(module, MoELoraMergeLayer)), None)


def join_losses(output: Any, inputs: Mapping[str, Any], record: Record) -> Any:
    """Add the losses on the routers to the loss that a call returns, if it returns one.

    The first item of a tuple is a loss where the call was asked for one, by labels or `return_loss`.
    """
    loss = record.loss()
    if isinstance(output, tuple):
        asked = inputs.get("return_loss") or "labels" in inputs
        if not asked:
            return output
        record.joined = True
        return (output[0] + loss.to(output[0].device), *output[1:])
    if getattr(output, "loss", None) is None:
        return output
    record.joined = True
    output.loss = output.loss + loss.to(output.loss.device)
    return output
