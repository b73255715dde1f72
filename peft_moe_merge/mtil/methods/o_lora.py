"""O-LoRA: a LoRA per task, summed; new ones keep out of the old ones' way."""

# F inputs of a linear layer, R rank, P ranks of all earlier LoRAs

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.task import Task
from ..settings import check_at_least, setting
from .kept_loras import KeptLoras
from .lora import LoraSettings


@dataclass
class OLoraSettings(LoraSettings):
    """Of O-LoRA."""

    o_lora_weight: float = setting(
        0.5, "o_lora: of the squared products of a LoRA's down projection with earlier ones"
    )

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, 0, "o_lora_weight")


class OLora(KeptLoras):
    """The loss has, per linear layer, the squared entries of `A_i A^T`, A new and A_i of each earlier LoRA.

    Wang et al., Orthogonal subspace learning for language model continual learning, arXiv 2310.14152.
    All LoRAs are summed, whichever task is tested. Here they are in both towers of CLIP and all linear layers, as those
    of the other methods, where that paper has them in the queries and values of a language model.
    """

    name = "o_lora"
    settings_class = OLoraSettings
    shardable = False  # its loss multiplies new factors, in parts, with earlier ones that are whole

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        self.earlier_PF = {
            layer: torch.cat([lora[layer][0] for lora in self.loras])
            for layer in (self.pretrained if self.loras else ())
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        return loss + self.settings.o_lora_weight * self.overlap() if self.earlier_PF else loss

    def overlap(self) -> Tensor:
        """Sum the squared products of the new down projections' rows with the earlier ones', over all layers."""
        total = 0.0
        for layer, lora in self.layers().items():
            down_RF = lora.lora_A["default"].weight
            self.earlier_PF[layer] = self.earlier_PF[layer].to(down_RF.device)
            total = total + (self.earlier_PF[layer] @ down_RF.T).square().sum()
        return total
