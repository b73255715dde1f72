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
            routers, experts_kind = MoELoraMergeLayer.adapter_layer_names[1], MoELoraMergeLayer.adapter_layer_names[0]
            bank = key.rpartition(".columns.")[0].replace(f".{routers}.", f".{experts_kind}.")
            experts = len(own[f"{bank}.frozen"])
            if not 0 <= int(tensor.min()) <= int(tensor.max()) < experts:
                raise ValueError(
                    f"These weights do not fit {described}: {key} leads to the experts {tensor.tolist()}, but there are "
                    f"{experts}. The file is damaged."
                )


def counted_by_column(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an adapter whose tasks have experts of their own, with usage by column, T x C.

    Before it was kept so, files held T x E: of each task what it selected of all experts.
    """
    converted = dict(state_dict)
    for key, usage in state_dict.items():
        routers, found, _ = key.rpartition(".usage")
        if not found or usage.ndim != 2:
            continue
        known = [state_dict.get(f"{routers}.columns.{task}") for task in range(len(usage))]
        widths = [0 if columns is None else len(columns) for columns in known]
        if min(widths, default=0) == 0 or usage.shape[1] == max(widths):
            continue
        rows = usage.new_zeros(len(usage), max(widths))
        for task, columns in enumerate(known):
            lists = columns.tolist()
            for column in {lists.index(expert) for expert in lists if 0 <= expert < usage.shape[1]}:
                rows[task, column] = usage[task, lists[column]]
        converted[key] = rows
    return converted
