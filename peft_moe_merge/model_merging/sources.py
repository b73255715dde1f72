"""Fine-tuned parameters that are read, or computed, one at a time, so that several models are never in memory together.

Shapes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file


class StoredTensors(Mapping):
    """The tensors of safetensors files by name, each read when it is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Take the file that each tensor is in."""
        self.files = dict(files)

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Renamed(Mapping):
    """Some tensors of another mapping, under names of their own."""

    def __init__(self, source: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
        """Take the source, and for each new name the one there."""
        self.source, self.names = source, dict(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.source[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class LoraTensors(Mapping):
    """The weights that a LoRA changes, `W + up · down`, each computed when it is asked for.

    Attributes:
        base: the pretrained parameters by name.
        factors: by name `up_OR`, scaled, and `down_RI`.
    """

    def __init__(
        self, base: Mapping[str, torch.Tensor], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.base, self.factors = base, dict(factors)

    def delta(self, name: str) -> torch.Tensor:
        """Return `up · down` in float32 or more."""
        up_OR, down_RI = (f.to(torch.promote_types(f.dtype, torch.float32)) for f in self.factors[name])
        return up_OR @ down_RI

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = self.base[name]
        precise = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (precise + self.delta(name).to(precise)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)


def stored_tensors(folder: str | PathLike, config: transformers.PretrainedConfig, model_cls: type) -> Mapping | None:
    """Open a model's safetensors, None where a tensor is missing, or is not in the file as it is in the model.

    The files of some models (ViT, DINOv2) keep the names of earlier releases of transformers, by which it loads and saves.

    Args:
        folder: or a Hub id.
        config: of the model.
        model_cls: its class.
    """
    single = cached_file(folder, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        with safe_open(single, "pt") as file:
            files = dict.fromkeys(file.keys(), Path(single))
    else:
        index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return None
        parts = json.loads(Path(index).read_text())["weight_map"]
        found = {part: Path(cached_file(folder, part)) for part in sorted(set(parts.values()))}
        files = {name: found[part] for name, part in parts.items()}
    with torch.device("meta"):
        model = model_cls(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if parameters.keys() <= files.keys():
        return StoredTensors(files)
    renamed = revert_weight_conversion(model, parameters) if isinstance(model, transformers.PreTrainedModel) else {}
    places = {id(tensor): name for name, tensor in renamed.items() if name in files}
    if not all(id(parameter) in places for parameter in parameters.values()):
        return None
    return Renamed(StoredTensors(files), {name: places[id(parameter)] for name, parameter in parameters.items()})


def load_lora(base: nn.Module, adapter: str | PathLike) -> PeftModel:
    """Load an adapter beside the weights of `base` itself, of which no copy is made; `base` is as it was afterwards."""
    wants = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    try:
        return PeftModel.from_pretrained(copy.deepcopy(base, shared), adapter)
    finally:
        for parameter, before in wants:
            parameter.requires_grad_(before)


def lora_tensors(model: PeftModel, base: Mapping[str, torch.Tensor]) -> LoraTensors | None:
    """Take a LoRA's factors; None where it is more than plain factors beside linear layers, or not on this base.

    Args:
        model: with one active adapter.
        base: the pretrained parameters by name.
    """
    if len(model.active_adapters) != 1 or model.active_peft_config.peft_type != "LORA":
        return None
    (name,) = model.active_adapters
    factors, beside = {}, set()
    for path, layer in model.base_model.model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        plain = type(layer) is LoraLinear and isinstance(layer.get_base_layer(), nn.Linear) and not layer.merged
        if not plain or getattr(layer, "lora_variant", None) or getattr(layer, "fan_in_fan_out", False):
            return None
        if name not in layer.lora_A:
            continue
        if layer.lora_B[name].bias is not None or f"{path}.weight" not in base:
            return None
        up, down = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
        beside |= {id(layer.lora_B[name].weight), id(layer.lora_A[name].weight)}
        precise = torch.promote_types(up.dtype, torch.float32)
        factors[f"{path}.weight"] = (up.to(precise) * layer.scaling[name], down.to(precise))
    for path, parameter in model.base_model.model.named_parameters(remove_duplicate=False):
        if id(parameter) in beside or (".lora_" in path and f".{name}." not in path):
            continue  # a factor, or another adapter's
        own = base.get(path.replace(".base_layer.", "."))
        if own is None or (own.data_ptr() != parameter.data_ptr() and not torch.equal(own, parameter.to(own))):
            return None
    return LoraTensors(base, factors)
