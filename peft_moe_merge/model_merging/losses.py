"""Losses of predictions for adaptation at test time; all but one need no labels.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from .batches import labels_of


def entropy(logits_BC: torch.Tensor) -> torch.Tensor:
    """Mean Shannon entropy of the predictions (AdaMerging, arXiv 2310.02575; WEMoE, arXiv 2402.00433).

    Its minimum is reached as well by answering always the same class: on hard images adaptation can collapse.
    """
    return -(logits_BC.softmax(-1) * logits_BC.log_softmax(-1)).sum(-1).mean()


def mutual_information(logits_BC: torch.Tensor) -> torch.Tensor:
    """Entropy minus the entropy of the mean prediction: sure of each image, and of not always the same class.

    The negative mutual information of images and predictions (Krause et al., NIPS 2010; SHOT, arXiv 2002.08546).
    """
    mean_C = logits_BC.softmax(-1).mean(0)
    return entropy(logits_BC) + torch.special.xlogy(mean_C, mean_C).sum()


def loss_of(name: str, logits_BC: torch.Tensor, batch: Any) -> torch.Tensor:
    """Compute a loss by its name: one of `LOSSES`, or `"cross_entropy"` with the labels of the batch.

    Raises:
        ValueError: labels are needed and the batch has none.
    """
    if name == "cross_entropy":
        return F.cross_entropy(logits_BC.float(), labels_of(batch).to(logits_BC.device))
    return LOSSES[name](logits_BC.float())


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "entropy": entropy,
    "mutual_information": mutual_information,
}
