"""Fine-tuned models in any form, checked against their base model and turned into task vectors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TypeAlias

import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from .sources import LoraTensors, Renamed, load_lora, lora_tensors, stored_tensors

Finetuned: TypeAlias = "nn.Module | str | PathLike | Mapping[str, torch.Tensor]"

LISTED = 20  # tensors that an error message lists before it only counts


@dataclass(frozen=True)
class TaskVectors:
    """Fine-tuned minus pretrained parameters, computed when asked for, in float32 or more.

    Attributes:
        tasks: the names of the fine-tuned models, in order.
        base: the pretrained parameters by name.
        finetuned: for each task its parameters by name; those that are absent are unchanged. Those of files are read, and
            those of LoRAs computed, each time they are asked for: memory holds one at a time.
    """

    tasks: tuple[str, ...]
    base: dict[str, torch.Tensor]
    finetuned: dict[str, Mapping[str, torch.Tensor]]

    def delta(self, task: str, name: str) -> torch.Tensor:
        """Return τ of one task for the parameter `name`."""
        base = precise(self.base[name])
        if name not in self.finetuned[task]:
            return torch.zeros_like(base)
        if isinstance(self.finetuned[task], LoraTensors):
            return self.finetuned[task].delta(name).to(base)
        return precise(self.finetuned[task][name]).to(base.device) - base

    def stacked(self, name: str) -> torch.Tensor:
        """Return the task vectors of the parameter `name`, `[T, *shape]`."""
        return torch.stack([self.delta(task, name) for task in self.tasks])

    def summed(self, name: str) -> torch.Tensor:
        """Return the sum of all task vectors of the parameter `name`, of which one at a time is in memory."""
        total = self.delta(self.tasks[0], name)
        for task in self.tasks[1:]:
            total += self.delta(task, name)
        return total

    def factors(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Return `up_OR` and `down_RI` of each task's change to a weight, None if any of them is no LoRA.

        A task that left the weight alone has factors of rank 0.
        """
        models = [self.finetuned[task] for task in self.tasks]
        if not all(isinstance(model, LoraTensors) for model in models):
            return None
        weight_OI = precise(self.base[name])
        nothing = (weight_OI.new_zeros(len(weight_OI), 0), weight_OI.new_zeros(0, weight_OI.shape[1]))
        return [model.factors.get(name, nothing) for model in models]

    def changed(self, task: str | None = None) -> set[str]:
        """Return the names of the parameters that one task, or any of them, changed."""
        tasks = self.tasks if task is None else (task,)
        return {
            name
            for task in tasks
            for name, tensor in self.finetuned[task].items()
            if not torch.equal(tensor.to(self.base[name]), self.base[name])
        }


def precise(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float32 or more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def finetuned_model(base: nn.Module, vectors: TaskVectors, task: str) -> nn.Module:
    """Return a copy of the base model with one task's parameters, in eval mode and without gradients."""
    model = copy.deepcopy(base).eval().requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in vectors.finetuned[task]:
            parameter.copy_(vectors.finetuned[task][name])
    return model


def load_task_vectors(
    base: nn.Module, finetuned: Mapping[str, Finetuned] | Iterable[tuple[str, Finetuned]]
) -> TaskVectors:
    """Load fine-tuned models and check that each can be a fine-tuned copy of `base`.

    Args:
        base: the pretrained model.
        finetuned: see `merge_finetuned`.

    Raises:
        ValueError: see `merge_finetuned`.
        TypeError: see `merge_finetuned`.
    """
    if isinstance(base, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError(
            "the base model has adapters in it; pass the plain pretrained model (`peft_model.unload()` gives it back)."
        )
    pairs = list(finetuned.items() if isinstance(finetuned, Mapping) else finetuned)
    if not pairs:
        raise ValueError("there is no fine-tuned model to merge; expected {task name: model, ...}.")
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the task names {twice} occur more than once; every fine-tuned model needs its own.")

    parameters = {name: p.detach() for name, p in base.named_parameters(remove_duplicate=False)}
    _check_finite("the base model", parameters)
    vectors = TaskVectors(tuple(names), parameters, {})
    for task, model in pairs:
        state = _align(_state_dict(base, task, model), parameters)
        if not isinstance(state, LoraTensors):
            _check_tensors(task, state, parameters)
        _check_finite(f"the fine-tuned model {task!r}", state)
        if not isinstance(state, LoraTensors):
            state = Renamed(state, {name: name for name in parameters if name in state})
        vectors.finetuned[task] = state
        if not vectors.changed(task):
            raise ValueError(
                f"the fine-tuned model {task!r} is equal to the base model: its task vector is zero. Was the base "
                "model trained in place, or the wrong checkpoint given?"
            )
    _check_dtypes(vectors)
    return vectors


def _state_dict(base: nn.Module, task: str, model: Finetuned) -> Mapping[str, torch.Tensor]:
    if isinstance(model, PeftModel):
        parameters = {name: p.detach() for name, p in base.named_parameters(remove_duplicate=False)}
        if (lora := lora_tensors(model, parameters)) is not None:
            return lora
        return copy.deepcopy(model).merge_and_unload().state_dict()
    if isinstance(model, nn.Module):
        return model.state_dict()
    if isinstance(model, Mapping):
        return model
    if not isinstance(model, (str, PathLike)):
        raise TypeError(
            f"the fine-tuned model {task!r} is a {type(model).__name__}; expected a model, a folder or Hub id, or a "
            "state dict."
        )
    if find_adapter_config_file(str(model)) is not None:
        cached_file(model, ADAPTER_SAFE_WEIGHTS_NAME)  # PEFT would take a pickle if there were no safetensors
        return _state_dict(base, task, load_lora(base, model))
    config = transformers.AutoConfig.from_pretrained(model)
    model_cls = getattr(transformers, (config.architectures or [""])[0], type(base))
    if (stored := stored_tensors(model, config, model_cls)) is not None:
        return stored
    loaded, info = model_cls.from_pretrained(model, dtype="auto", use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the fine-tuned model {task!r} ({model}) lacks {_listed(sorted(info['missing_keys']))}.")
    return loaded.state_dict()


def _align(state: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Give the tensors of a part of the model, such as a `CLIPVisionModel`, their names in the whole model."""
    if any(name in parameters for name in state):
        return state

    def fitting(part: str) -> int:
        names = ((f"{part}.{name}", tensor) for name, tensor in state.items())
        return sum(name in parameters and parameters[name].shape == tensor.shape for name, tensor in names)

    part = max(sorted({name.partition(".")[0] for name in parameters}), key=fitting)
    return Renamed(state, {f"{part}.{name}": name for name in state}) if fitting(part) else state


def _check_tensors(task: str, state: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor]) -> None:
    parts = {name.partition(".")[0] for name in state}
    problems = [
        f"{name}: not in the fine-tuned model"
        for name in parameters
        if name not in state and name.partition(".")[0] in parts
    ]
    for name, tensor in state.items():
        if name in parameters and tensor.shape != parameters[name].shape:
            problems.append(f"{name}: {tuple(tensor.shape)}, in the base model {tuple(parameters[name].shape)}")
        elif (
            name not in parameters
            and tensor.is_floating_point()
            and not name.endswith(("running_mean", "running_var"))
        ):
            problems.append(f"{name}: not in the base model")
    if not any(name in parameters for name in state):
        problems = [
            f"no tensor has a name of the base model's (the first of each: {next(iter(state), None)!r}, "
            f"{next(iter(parameters))!r})"
        ]
    if problems:
        raise ValueError(
            f"the fine-tuned model {task!r} is not a copy of the base model's architecture:\n  "
            + "\n  ".join(problems[:LISTED])
            + (f"\n  and {len(problems) - LISTED} more" if len(problems) > LISTED else "")
        )


def _check_finite(whose: str, state: Mapping[str, torch.Tensor]) -> None:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"{whose} has NaN or infinite weights in {_listed(bad)}; a merge would spread them to all tasks."
        )


def _check_dtypes(vectors: TaskVectors) -> None:
    """Differences between roundings are as large as task vectors, hence half precisions do not mix."""
    dtypes = {
        owner: {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
        for owner, state in {"the base model": vectors.base, **vectors.finetuned}.items()
    }
    used = set().union(*dtypes.values())
    described = "; ".join(f"{owner}: {', '.join(sorted(map(str, kinds)))}" for owner, kinds in dtypes.items())
    if {torch.float16, torch.bfloat16} <= used:
        raise ValueError(
            f"float16 and bfloat16 models cannot be merged, since their roundings differ as much as fine-tuning does "
            f"({described}). Load all of them from checkpoints of one precision."
        )
    if len(used) > 1:
        warnings.warn(
            f"the models have different precisions ({described}); what rounding changed counts as fine-tuning.",
            stacklevel=4,
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
