"""Which expert gives way to which pair, how two experts become one, and who freezes. Pure functions on tensors.

Shapes: E experts, R bottleneck rank, D input width, O output width. Counts and flags are per block.
Source: arXiv 2405.11530, Algorithm 1, whose text (the least selected expert is overwritten) is followed where its
listing differs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Expert = dict[str, Tensor]
"""One expert's tensors: `down_weight` R x D, `down_bias` R, `up_weight` R x O, `up_bias` O."""


class Merge(NamedTuple):
    """Expert `target` becomes the union of experts `first` and `second`, which stay as they are."""

    target: int
    first: int
    second: int


def ranked(usage_E: Tensor) -> list[int]:
    """List the experts from the most to the least selected, the lower index first between equals."""
    return usage_E.argsort(descending=True, stable=True).tolist()


def least_used(usage_E: Tensor, frozen_E: Tensor, sources: tuple[int, int]) -> int | None:
    """Find the expert that gives way: the least selected one that is neither frozen nor a source.

    Between equals the lower index gives way. A frozen expert never does: an earlier task lives on it.
    """
    candidates = [expert for expert, frozen in enumerate(frozen_E.tolist()) if not frozen and expert not in sources]
    counts = usage_E.tolist()
    return min(candidates, key=counts.__getitem__, default=None)


def most_used_pair(usage_E: Tensor, experts: Callable[[int], Expert]) -> tuple[int, int]:
    """Choose the two most selected experts, as the paper does. Frozen experts are allowed as sources."""
    first, second = ranked(usage_E)[:2]
    return first, second


def most_similar_pair(usage_E: Tensor, experts: Callable[[int], Expert]) -> tuple[int, int]:
    """Choose, among the experts selected more often than the average one, the two whose weights are most alike.

    Alike is the cosine between the functions' linear parts, `<A_i B_i, A_j B_j>`: it does not depend on the order of
    hidden units. Falls back to the two most selected where fewer than two stand out or nothing has been learnt.
    """
    frequent = [expert for expert in ranked(usage_E) if usage_E[expert] > usage_E.double().mean()]
    if len(frequent) < 2:
        return most_used_pair(usage_E, experts)
    down_FRD = torch.stack([experts(expert)["down_weight"] for expert in frequent]).float()
    up_FRO = torch.stack([experts(expert)["up_weight"] for expert in frequent]).float()
    # <A_i B_i, A_j B_j> = sum over unit pairs of <a_r, a_s> <b_r, b_s>: no D x O product is formed
    gram_FF = torch.einsum("ird,jsd,iro,jso->ij", down_FRD, down_FRD, up_FRO, up_FRO)
    norm_F = gram_FF.diagonal().clamp_min(torch.finfo(gram_FF.dtype).tiny).sqrt()
    cosine_FF = (gram_FF / norm_F[:, None] / norm_F[None, :]).triu(1)
    if not cosine_FF.any():
        return most_used_pair(usage_E, experts)
    i, j = divmod(int(cosine_FF.argmax()), len(frequent))
    return frequent[i], frequent[j]


PAIRS: dict[str, Callable[[Tensor, Callable[[int], Expert]], tuple[int, int]]] = {
    "most_used": most_used_pair,
    "most_similar": most_similar_pair,
}
"""Which two experts merge, by the name used in `MoELoraMergeConfig.merge_pair`."""


def choose_merge(
    usage_E: Tensor, frozen_E: Tensor, experts: Callable[[int], Expert], pair: str = "most_used"
) -> Merge | None:
    """Decide the merge of one block.

    Args:
        usage_E: how often each expert was selected since the task began, summed over all processes.
        frozen_E: which experts are frozen.
        experts: gives an expert's tensors by its index; only some rules for the pair look at them.
        pair: a name in `PAIRS`.

    Returns:
        The merge, or None where there can be none: fewer than three experts, no selection counted (nothing says which
        experts matter), or no expert left that may be overwritten.
    """
    if usage_E.numel() < 3 or not usage_E.any():
        return None
    sources = PAIRS[pair](usage_E, experts)
    target = least_used(usage_E, frozen_E, sources)
    return None if target is None else Merge(target, *sources)


def average(first: Expert, second: Expert) -> Expert:
    """Take the mean of the two experts, tensor by tensor, as the paper does."""
    return {name: (tensor + second[name]) / 2 for name, tensor in first.items()}


def aligned(first: Expert, second: Expert) -> Expert:
    """Reorder the second expert's hidden units to match the first's, then take the mean.

    The order of hidden units has no meaning: permuting the rows of A, a and B together leaves an expert's function
    unchanged. A mean of unlike units destroys both, so units are first paired by the assignment with the largest
    total inner product of `(a row of A, of a, of B)`, each part scaled to unit norm over the expert so that none
    drowns the others.
    """

    def units(expert: Expert) -> Tensor:
        parts = [expert["down_weight"], expert["down_bias"].unsqueeze(1), expert["up_weight"]]
        return torch.cat([part / part.norm().clamp_min(torch.finfo(part.dtype).tiny) for part in parts], dim=1)

    similarity_RR = units(first).double() @ units(second).double().T
    _, order = linear_sum_assignment(similarity_RR.cpu().numpy(), maximize=True)
    order = torch.from_numpy(order).to(second["down_weight"].device)
    permuted = {name: tensor if name == "up_bias" else tensor[order] for name, tensor in second.items()}
    return average(first, permuted)


STRATEGIES: dict[str, Callable[[Expert, Expert], Expert]] = {"average": average, "aligned": aligned}
"""How two experts become one, by the name used in `MoELoraMergeConfig.merge_strategy`."""


def favourites(usage_E: Tensor, top_k: int) -> list[int]:
    """List the `top_k` most selected experts, in ascending order; never one that was not selected at all."""
    return sorted(expert for expert in ranked(usage_E)[:top_k] if usage_E[expert] > 0)
