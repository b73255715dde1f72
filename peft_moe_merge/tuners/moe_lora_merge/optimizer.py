"""What an optimizer has to know of the experts: which parameters train now, and at which rates."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .layer import MoELoraMergeLayer

_watches: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()


def loraplus_groups(model: nn.Module, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Make parameter groups in which the experts' second matrices learn faster than all else (LoRA+, arXiv 2402.12354).

        optimizer = torch.optim.AdamW(loraplus_groups(model, lr=1e-3, ratio=4))

    Args:
        model: a model with experts, whose current task is to be trained.
        lr: rate of all but the second matrices.
        ratio: what the rate of the second matrices, which start at zero, is multiplied by.

    Raises:
        ValueError: `ratio` is not positive; nothing trains.
    """
    if not ratio > 0:
        raise ValueError(f"`ratio` multiplies a learning rate, so it must be positive; got {ratio}.")
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("No parameter trains: choose a task by `model.set_task(name)`.")
    up = [parameter for name, parameter in trained if ".up_weight." in name or ".up_bias." in name]
    fast = {id(parameter) for parameter in up}
    others = [parameter for _, parameter in trained if id(parameter) not in fast]
    return [{"params": others, "lr": lr}, {"params": up, "lr": lr * ratio}]


def watch_optimizers(tuner: nn.Module) -> None:
    """Warn, once, if an optimizer steps that was made before what now trains: it would leave that as it is.

    Which parameters train changes with the task. Two steps of an optimizer are watched, since other optimizers may take
    their turns in between and know what this one does not.
    """
    if tuner in _watches:
        _watches[tuner].stop()
    _watches[tuner] = _Watch(tuner)


class _Watch:
    def __init__(self, tuner: nn.Module):
        self.tuner = weakref.ref(tuner)
        self.stepped: dict[int, set[int]] = {}
        self.done = False
        self.stop = weakref.finalize(tuner, register_optimizer_step_pre_hook(self).remove)

    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        tuner = self.tuner()
        if self.done or tuner is None:
            return
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        training = {id(parameter): parameter for parameter in _training(tuner)}
        if known.isdisjoint(training):  # it is somebody else's, or ours and of an earlier task
            ours = {id(parameter) for name, parameter in tuner.named_parameters() if tuner.prefix in name}
            if known.isdisjoint(ours):
                return
        if id(optimizer) not in self.stepped:
            self.stepped[id(optimizer)] = known
            return
        self.done = True  # it stays, idle: hooks can't be removed while they are called
        known = set().union(*self.stepped.values())
        unknown = {key for key, parameter in training.items() if parameter.grad is not None and key not in known}
        left_out = (
            [name for name, parameter in tuner.named_parameters() if id(parameter) in unknown] if unknown else []
        )
        if left_out:
            warnings.warn(
                f"{len(left_out)} parameters get gradients that no optimizer knows, such as {left_out[0]!r}: it was made "
                "before `set_task` or `add_task` changed what trains, and leaves them as they are. Make an optimizer (and "
                "with it the `Trainer`) for each task, after `set_task`.",
                stacklevel=3,
            )


def _training(tuner: nn.Module) -> Iterator[nn.Parameter]:
    """Go through the experts and routers that train, without a look at those of other tasks."""
    for layer in tuner.modules():
        if isinstance(layer, MoELoraMergeLayer):
            for adapter_name in set(layer.active_adapters) & set(layer.moe_lora_experts):
                current = layer.adapters.configs[adapter_name].current_index
                for parameter, _ in layer.learners(adapter_name, [] if current is None else [current]):
                    if parameter.requires_grad:
                        yield parameter
