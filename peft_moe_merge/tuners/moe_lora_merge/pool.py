"""Who gets which experts, which two merge, how they become one, and who freezes. Pure functions on tensors.

Shapes: E experts, F of them, R bottleneck rank, S ranks of several experts together, D input width, O output width. Counts
and flags are per block.
Source: arXiv 2405.11530, Algorithm 1, whose text (the least selected expert is overwritten) is followed where its
listing differs.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Expert = dict[str, Tensor]
"""One expert's tensors: `down_weight` R x D, `up_weight` R x O and, unless it is linear, `down_bias` R, `up_bias` O."""


class Merge(NamedTuple):
    """Expert `target` becomes the union of experts `first` and `second`.

    In the paper it is a third one, and the two stay as they are; where tasks are redirected it is the first one, and the
    second one's place is free again.
    """

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
    return most_alike(frequent, experts) or most_used_pair(usage_E, experts)


def most_alike(candidates: list[int], experts: Callable[[int], Expert]) -> tuple[int, int] | None:
    """Choose the two candidates with the largest cosine between their linear parts; None where nothing is alike."""
    if len(candidates) < 2:
        return None
    down_FRD = torch.stack([experts(expert)["down_weight"] for expert in candidates]).float()
    up_FRO = torch.stack([experts(expert)["up_weight"] for expert in candidates]).float()
    # <A_i B_i, A_j B_j> = sum over unit pairs of <a_r, a_s> <b_r, b_s>: no D x O product is formed
    products_FRFS = torch.einsum("ird,jsd->irjs", down_FRD, down_FRD) * torch.einsum("iro,jso->irjs", up_FRO, up_FRO)
    gram_FF = products_FRFS.sum(dim=(1, 3))
    norm_F = gram_FF.diagonal().clamp_min(torch.finfo(gram_FF.dtype).tiny).sqrt()
    cosine_FF = (gram_FF / norm_F[:, None] / norm_F[None, :]).triu(1)
    if not cosine_FF.any():
        return None
    above_FF = torch.ones_like(cosine_FF, dtype=torch.bool).triu(1)
    i, j = divmod(int(cosine_FF.masked_fill(~above_FF, -torch.inf).argmax()), len(candidates))
    return candidates[i], candidates[j]


def random_pair(usage_E: Tensor, experts: Callable[[int], Expert]) -> tuple[int, int]:
    """Draw two of the experts: a control, to see what the choice of the pair is worth. The same counts give the same pair."""
    usage = usage_E.tolist()
    open_to_it = [expert for expert, count in enumerate(usage) if count >= 0]
    first, second = random.Random(str(usage)).sample(open_to_it, 2)
    return first, second


PAIRS: dict[str, Callable[[Tensor, Callable[[int], Expert]], tuple[int, int]]] = {
    "most_used": most_used_pair,
    "most_similar": most_similar_pair,
    "random": random_pair,
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


def usage_of(some: list[int], usage_E: Tensor) -> Tensor:
    """Return the usage of some experts; all others have -1, less than any expert that may be chosen."""
    among_E = torch.full_like(usage_E, -1)
    among_E[some] = usage_E[some]
    return among_E


def choose_union(
    usage_E: Tensor, own: list[int], experts: Callable[[int], Expert], pair: str = "most_used", keep: int = 1
) -> Merge | None:
    """Decide which two of a task's own experts become one, the second of which then is free.

    Args:
        usage_E: how often each expert was selected since the task began.
        own: the task's experts.
        experts: gives an expert's tensors by its index.
        pair: a name in `PAIRS`.
        keep: do not go below so many experts.

    Returns:
        The merge, or None where there can be none.
    """
    own = sorted(set(own))
    if len(own) <= max(keep, 1):
        return None
    first, second = PAIRS[pair](usage_of(own, usage_E), experts)
    return Merge(first, first, second) if {first, second} <= set(own) else None


def choose_room(used: list[int], usage_E: Tensor, experts: Callable[[int], Expert], pair: str = "most_used") -> Merge:
    """Decide which two experts of old tasks become one, to make room: the most alike ones, of those that anybody uses.

    Where none are alike, as before they have learnt, the first two.

    Args:
        used: the experts that somebody uses, two at least.
        usage_E: how often each expert was selected by all tasks.
        experts: gives an expert's tensors by its index.
        pair: "random" draws the two; any other name in `PAIRS` takes the most alike.
    """
    used = sorted(used)
    if pair == "random":
        first, second = sorted(random_pair(usage_of(used, usage_E), experts))
    else:
        first, second = most_alike(used, experts) or used[:2]
    return Merge(first, first, second)


def untouched(experts: int, known: list[list[int]]) -> list[int]:
    """List the experts that no task knows.

    Args:
        experts: E.
        known: the experts of each task.
    """
    taken = {expert for task in known for expert in task}
    return [expert for expert in range(experts) if expert not in taken]


def average(first: Expert, second: Expert, share: float = 0.5) -> Expert:
    """Take the mean of the two experts, tensor by tensor, as the paper does, whatever their share of selections."""
    return {name: (tensor + second[name]) / 2 for name, tensor in first.items()}


def aligned(first: Expert, second: Expert, share: float = 0.5) -> Expert:
    """Reorder the second expert's hidden units to match the first's, then take the mean.

    The order of hidden units has no meaning: permuting the rows of A, a and B together leaves an expert's function
    unchanged. A mean of unlike units destroys both, so units are first paired by the assignment with the largest
    total inner product of `(a row of A, of a, of B)`, each part scaled to unit norm over the expert so that none
    drowns the others.
    """

    def units(expert: Expert) -> Tensor:
        parts = [part if part.ndim == 2 else part.unsqueeze(1) for name, part in expert.items() if name != "up_bias"]
        return torch.cat([part / part.norm().clamp_min(torch.finfo(part.dtype).tiny) for part in parts], dim=1)

    similarity_RR = units(first).double() @ units(second).double().T
    _, order = linear_sum_assignment(similarity_RR.cpu().numpy(), maximize=True)
    order = torch.from_numpy(order).to(second["down_weight"].device)
    permuted = {name: tensor if name == "up_bias" else tensor[order] for name, tensor in second.items()}
    return average(first, permuted)


def product(first: Expert, second: Expert, share: float = 0.5) -> Expert:
    """Take the best expert of the same rank for the weighed sum of the two updates, `share A_1 B_1 + (1 - share) A_2 B_2`.

    The update is of rank 2 R at most: QR decompositions of the stacked factors leave a matrix of 2R x 2R, whose singular
    value decomposition is cut at R (Eckart and Young). Unlike a mean of factors it depends on the updates alone, not on
    the bases in which they are written. Each hidden unit gets the sign that makes the largest number of its row of `A`
    positive: a decomposition leaves signs open, and rounding would choose them. For experts without an activation.

    Args:
        first, second: the experts, without biases.
        share: weight of the first, its share of the selections.
    """
    rank = len(first["down_weight"])
    down_RD, size_R, up_RO = cut([(first, share), (second, 1 - share)], rank)
    root_R1 = size_R.sqrt().unsqueeze(1)
    union = {"down_weight": root_R1 * down_RD, "up_weight": root_R1 * up_RO}
    return {name: tensor.to(first[name].dtype) for name, tensor in union.items()}


def cut(experts: Sequence[tuple[Expert, float]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a weighed sum of the updates of linear experts, and keep what is largest.

    Args:
        experts: each with its weight.
        rank: R, directions to keep.

    Returns:
        The directions read, R x D, their sizes in descending order, R, and the directions written, R x O; both orthonormal,
        float64. Beyond the rank of the sum there are zeros.
    """
    down_SD = torch.cat([expert["down_weight"] for expert, _ in experts]).double()
    up_SO = torch.cat([weight * expert["up_weight"].double() for expert, weight in experts])
    basis_DS, left_SS = torch.linalg.qr(down_SD.T)
    basis_OS, right_SS = torch.linalg.qr(up_SO.T)
    u_SS, size_S, v_SS = torch.linalg.svd(left_SS @ right_SS.T, full_matrices=False)
    down_DR, up_OR, size_R = basis_DS @ u_SS[:, :rank], basis_OS @ v_SS[:rank].T, size_S[:rank]
    sign_R = down_DR.gather(0, down_DR.abs().argmax(dim=0, keepdim=True)).sign()
    missing = rank - len(size_R)
    down_RD, up_RO = (F.pad((of_SR * sign_R).T, (0, 0, 0, missing)) for of_SR in (down_DR, up_OR))
    return down_RD, F.pad(size_R, (0, missing)), up_RO


def merged_start(tasks: Sequence[Sequence[Expert]], experts: int) -> list[Expert]:
    """Merge the experts of several tasks into those that a new task starts from: the mean of the tasks' updates.

    A task's update is the mean over its experts, as a router weighs them that has not learnt yet, and the mean over the new
    experts is the best approximation of it that they have the rank for. Directions are dealt out in turns, so that no expert
    has only weak ones. A row of `A` is as long as those of a fresh expert are on average, so that the same rate suits both.

    Args:
        tasks: per task its experts, without biases and all of one rank.
        experts: how many to make.
    """
    like = tasks[0][0]
    shares = [(expert, 1 / (len(tasks) * len(own))) for own in tasks for expert in own]
    down_SD, size_S, up_SO = cut(shares, experts * len(like["down_weight"]))
    length = 3**-0.5  # of rows drawn uniformly from -1 / sqrt(D) to 1 / sqrt(D)
    down_SD, up_SO = down_SD * length, up_SO * size_S.unsqueeze(1) * (experts / length)
    made = [{"down_weight": down_SD[k::experts], "up_weight": up_SO[k::experts]} for k in range(experts)]
    return [{name: tensor.to(like[name].dtype).contiguous() for name, tensor in expert.items()} for expert in made]


def keep_used(first: Expert, second: Expert, share: float = 0.5) -> Expert:
    """Keep the expert with more selections as it is, and lose the other: a control, to see what a union is worth."""
    return {name: tensor.clone() for name, tensor in (first if share >= 0.5 else second).items()}


STRATEGIES: dict[str, Callable[[Expert, Expert, float], Expert]] = {
    "average": average,
    "aligned": aligned,
    "product": product,
    "keep_used": keep_used,
}
"""How two experts become one, by the name used in `MoELoraMergeConfig.merge_strategy`."""


def favourites(usage_E: Tensor, top_k: int, own: list[int] | None = None) -> list[int]:
    """List the `top_k` most selected experts, in ascending order; never one that was not selected at all.

    Args:
        usage_E: how often each was selected.
        top_k: how many to list.
        own: the experts to look at, where a task has experts of its own: counted over all, those of older tasks could come
            first, and the task's own would stay open to the next task.
    """
    candidates = list(range(len(usage_E))) if own is None else sorted(set(own))
    counts = usage_E[candidates]
    return sorted(candidates[place] for place in ranked(counts)[:top_k] if counts[place] > 0)
