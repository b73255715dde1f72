"""Which images stand for a class."""

# N images, P features

from __future__ import annotations

import torch
from torch import Tensor


def herd(features_NP: Tensor, count: int) -> list[int]:
    """Choose images, one after another, so that the mean of the chosen stays closest to the mean of all.

    The herding of iCaRL (Rebuffi et al., arXiv 1611.07725). The first of `herd(features, n)` are `herd(features, m)` for
    m < n: to keep fewer, cut the list.

    Args:
        features_NP: of all images of a class, of unit length.
        count: how many to choose, all if there are fewer.

    Returns:
        Rows, in the order chosen, none twice.
    """
    mean_P = features_NP.mean(dim=0)
    total_P = torch.zeros_like(mean_P)
    chosen: list[int] = []
    for size in range(1, min(count, len(features_NP)) + 1):
        distance_N = ((total_P + features_NP) / size - mean_P).norm(dim=1)
        distance_N[chosen] = torch.inf
        chosen.append(int(distance_N.argmin()))
        total_P = total_P + features_NP[chosen[-1]]
    return chosen
