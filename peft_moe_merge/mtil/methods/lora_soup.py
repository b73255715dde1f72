"""A soup of LoRAs: every task is learnt from the pretrained CLIP, and the changes are averaged."""

from __future__ import annotations

import torch

from .kept_loras import Changes, KeptLoras


class LoraSoup(KeptLoras):
    """The mean of the tasks' changes to the weights, over the tasks so far.

    Wortsman et al., Model soups, arXiv 2203.05482: there the ingredients have learnt one task with different settings,
    here each has learnt a task of its own, so that it is task arithmetic (arXiv 2212.04089) with the factor one over the
    number of tasks. The order of the tasks makes no difference to the last soup.
    """

    name = "lora_soup"

    def start(self) -> Changes:
        return {layer: torch.zeros_like(weight) for layer, weight in self.pretrained.items()}

    def merged(self) -> Changes:
        return {layer: change_OF / len(self.loras) for layer, change_OF in self.summed().items()}
