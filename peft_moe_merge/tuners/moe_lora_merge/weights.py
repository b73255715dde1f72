"""Do the weights in a file fit the adapter that is to load them?"""

from __future__ import annotations

from torch import Tensor, nn

from peft_moe_merge.files import check_tensors

from .config import MoELoraMergeConfig
from .layer import MoELoraMergeLayer


def check_weights(
    model: nn.Module, config: MoELoraMergeConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> None:
    """Refuse weights that are not just those of an adapter.

    Raises:
        ValueError: tensors are missing, unexpected, misshapen, of a wrong type or not finite, or a router leads to experts
            that are not there; each kind is named.
    """
    containers = (*MoELoraMergeLayer.adapter_layer_names, "modules_to_save")
    own = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if any(f".{container}.{adapter_name}." in key for container in containers)
    }
    described = (
        f"the adapter {adapter_name!r} ({config.experts_at_start} experts of rank {config.r}, tasks {config.tasks})"
    )
    check_tensors(state_dict, own, described)
    for key, tensor in state_dict.items():
        if ".columns." in key:
            experts = own[f"{key.rpartition('.columns.')[0]}.usage"].shape[1]
            if not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
                raise ValueError(
                    f"These weights do not fit {described}: {key} leads to the experts {tensor.tolist()}, but there are "
                    f"{experts}. The file is damaged."
                )
