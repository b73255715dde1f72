"""Soft use of a selector: the few likeliest tasks, each by its share.

Shapes: B images, R routes: the tasks, then none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mixture(posterior_BR: Tensor, mass: float = 0.95, most: int = 3) -> Tensor:
    """Keep the likeliest routes of each image, until they have this much of the posterior, and let them share it all.

    Args:
        posterior_BR: from `Selector.posterior`; rows add up to 1.
        mass: how much is enough, in (0, 1].
        most: how many routes are kept at most; with 1 the likeliest has it all.

    Returns:
        Shares B x R; rows add up to 1, and are zero where a route need not run.

    Raises:
        ValueError: a setting out of range.
    """
    if not 0 < mass <= 1 or most < 1:
        raise ValueError(f"`mass` must lie in (0, 1] and `most` be at least 1, got {mass} and {most}.")
    shares_BR, routes_BR = posterior_BR.sort(dim=1, descending=True, stable=True)
    before_BR = shares_BR.cumsum(dim=1) - shares_BR
    kept_BR = shares_BR * (before_BR < mass)
    kept_BR[:, most:] = 0
    kept_BR = kept_BR / kept_BR.sum(dim=1, keepdim=True)
    return torch.zeros_like(posterior_BR).scatter(1, routes_BR, kept_BR)
