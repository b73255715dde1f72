"""Losses on the router of a mixture of experts: spread the load, and keep away from experts that had to move.

Shapes: B decisions (samples, or tokens), E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, stack
from torch.linalg import vector_norm

from .routing import selection_counts


def balance_loss(gates_BE: Tensor, counts_E: Tensor) -> Tensor:
    """Load-balance loss of the Switch Transformer: experts selected often should get less probability.

    `E · Σ_e f_e P_e`, with `f_e` the share of selections that went to expert `e` and `P_e` its mean gate. Only `P`
    carries a gradient. The loss is 1 when the gates are uniform (whatever the counts) or when the load is; E when one
    expert gets everything.

    Args:
        gates_BE: gates of the current decisions, one distribution a row: the softmax over all experts, or the sparse
            gates after top-k (zero outside the selection), through which only selected experts feel the loss.
        counts_E: how often each expert was selected: in this batch, as in Switch, or in the current task so far.

    Returns:
        Scalar, in [0, E]; 0 as long as nothing was selected.

    Raises:
        ValueError: the number of counts is not the number of experts.

    Source: Fedus, Zoph, Shazeer, "Switch Transformers", JMLR 2022, section 2.2 (arXiv 2101.03961).
    """
    _require_one_per_expert(gates_BE, counts_E, "counts_E")
    counts_E = counts_E.detach()
    load_E = (counts_E / counts_E.sum().clamp_min(1)).to(
        gates_BE.dtype
    )  # shares fit any dtype, a task's counts do not
    return len(load_E) * (load_E * gates_BE.flatten(0, -2).mean(0)).sum()


def locality_loss(gates_BE: Tensor, moved_E: Tensor) -> Tensor:
    """Locality loss: the gate of an expert times how far that expert had to move, averaged over decisions.

    `mean_b Σ_e g_be Δ_e`. An expert that already fits the data hardly moves, so the router is hardly pushed off it; an
    expert that had to change much for this data is made less likely for it. The more often data meets the expert that
    knows it, the smaller the loss.

    Args:
        gates_BE: gates as in `balance_loss`; with sparse gates only the selected experts count.
        moved_E: distance each expert moved since the reference point, see `displacement`. Detach it to train the
            router alone; left attached, the loss also pulls the experts back to where they were.

    Returns:
        Scalar, in the unit of `moved_E`.

    Raises:
        ValueError: the number of distances is not the number of experts.

    Source: Li et al., "Theory on Mixture-of-Experts in Continual Learning", ICLR 2025, Eq. 6 (arXiv 2406.16437), whose
    single decision a round becomes a mean over decisions here.
    """
    _require_one_per_expert(gates_BE, moved_E, "moved_E")
    return (gates_BE * moved_E.to(gates_BE.dtype)).sum(-1).mean()


def router_loss(
    gates_GE: Tensor, indices_GK: Tensor, balance: float, locality: float, moved_E: Tensor | None = None
) -> Tensor:
    """Weigh and add the losses on one router in one call.

    Args:
        gates_GE: softmax over all experts.
        indices_GK: the experts selected.
        balance, locality: weights of the two losses; 0 is off.
        moved_E: how far the selected experts have moved, for the locality loss.
    """
    loss = gates_GE.new_zeros(())
    if balance:
        # this batch's load, as in Switch: the task's so far lags behind, and the router swings about it
        loss = loss + balance * balance_loss(gates_GE, selection_counts(indices_GK, gates_GE.shape[1]))
    if locality:
        selected_GE = torch.zeros_like(gates_GE).scatter_(1, indices_GK, 1.0)
        loss = loss + locality * locality_loss(gates_GE * selected_GE, moved_E.to(gates_GE.device))
    return loss


def displacement(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> Tensor:
    """Euclidean distance one expert's weights, all tensors together, moved between two moments.

    Args:
        now: the expert's tensors by name.
        before: the same tensors at the earlier moment.

    Returns:
        Scalar. Its gradient is zero, not infinite, for an expert that did not move.

    Raises:
        ValueError: the two are not tensors of the same names.
    """
    if now.keys() != before.keys():
        raise ValueError(f"An expert now of {sorted(now)} and before of {sorted(before)}: expected the same tensors.")
    return vector_norm(stack([vector_norm(now[name] - before[name]) for name in now]))


def _require_one_per_expert(gates_BE: Tensor, values_E: Tensor, name: str) -> None:
    if values_E.shape != gates_BE.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(values_E.shape)}, but the gates are of {gates_BE.shape[-1]} experts: "
            f"pass one value for each expert, shape ({gates_BE.shape[-1]},)."
        )
