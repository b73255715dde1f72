"""Losses of predictions that need no labels, for adaptation at test time.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


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


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "entropy": entropy,
    "mutual_information": mutual_information,
}
