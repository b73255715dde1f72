"""Do the weights in a file fit the adapter that is to load them?"""

from __future__ import annotations

from torch import Tensor, nn

from .config import MoELoraMergeConfig
from .layer import MoELoraMergeLayer


def check_weights(
    model: nn.Module, config: MoELoraMergeConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Refuse weights that are not just those of an adapter.

    Raises:
        ValueError: tensors are missing, unexpected, of a wrong shape or of a wrong type; each kind is named.
    """
    own = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if any(f".{container}.{adapter_name}." in key for container in MoELoraMergeLayer.adapter_layer_names)
    }
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(key for key in state_dict.keys() - own.keys() if ".moe_lora_" in key)
    misshapen = [
        f"{key} is {tuple(state_dict[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    mistyped = [  # a header may call floats integers, of the same size
        f"{key} is {state_dict[key].dtype}, expected {tensor.dtype}"
        for key, tensor in own.items()
        if key in state_dict and state_dict[key].is_floating_point() != tensor.is_floating_point()
    ]
    lost = [
        f"{key} names expert {int(tensor.max())}"
        for key, tensor in state_dict.items()
        if ".columns." in key and key in own and not 0 <= int(tensor.min()) <= int(tensor.max()) < _experts(key, own)
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of a wrong shape", misshapen),
            ("of a wrong type", mistyped),
            ("of experts that are not there", lost),
        )
        if keys
    ]
    if problems:
        raise ValueError(
            f"These weights do not fit the adapter {adapter_name!r} ({config.experts_at_start} experts of rank "
            f"{config.r}, tasks {config.tasks}). Tensors {'; '.join(problems)}. The file is damaged, or made for "
            "another base model or configuration."
        )


def _experts(key: str, own: dict[str, Tensor]) -> int:
    """Return how many experts there are in the block that a tensor of its routers belongs to."""
    return own[f"{key.rpartition('.columns.')[0]}.usage"].shape[1]
