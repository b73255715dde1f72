"""Which experts does a sample take, and with what weight? Pure functions on tensors.

Shapes: B samples, D width, E experts, K = top_k, T tasks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Keeps the noise of a router that has learnt to be certain from vanishing altogether.
MINIMAL_NOISE = 0.01


def router_logits(
    x_BD: Tensor,
    weight: Tensor,
    noise_weight: Tensor | None = None,
    position_B: Tensor | None = None,
    noise: float = 1.0,
) -> Tensor:
    """Score every expert for every sample.

    Args:
        x_BD: what the router looks at, token 0 of each sample.
        weight: the task's router D x E, without bias; or those of T tasks, T x D x E.
        noise_weight: the noise scale, of the same shape; given in training only. Adds
            `normal(0, 1) * (softplus(x N) + 0.01)` to the scores, the "noisy top-k" by which experts are explored
            (arXiv 2403.11549, section 3).
        position_B: with several tasks, which of them each sample has.
        noise: factor on the noise.

    Returns:
        logits_BE.
    """
    logits_BE = _project(x_BD, weight, position_B)
    if noise_weight is not None:
        scale_BE = F.softplus(_project(x_BD, noise_weight, position_B)) + MINIMAL_NOISE
        logits_BE = logits_BE + torch.randn_like(scale_BE) * (scale_BE if noise == 1.0 else scale_BE * noise)
    return logits_BE


def _project(x_BD: Tensor, weight: Tensor, position_B: Tensor | None) -> Tensor:
    if position_B is None:
        return x_BD @ weight
    # all tasks' scores in one product, then each sample's own: the scores are few, and no sample's weights are gathered
    T, D, E = weight.shape
    scores_BTE = (x_BD @ weight.transpose(0, 1).reshape(D, T * E)).view(-1, T, E)
    return scores_BTE[torch.arange(len(x_BD), device=x_BD.device), position_B]


def top_k_gates(logits_BE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the `top_k` best scored experts of each sample and weigh them against one another.

    The softmax runs over the chosen logits only; every other expert's gate is zero. Between equal scores the lower
    index wins, so a router that is still all zeros decides the same way on every device.

    Returns:
        indices_BK (int64) in descending order of score, and gates_BK, which sum to one in each row.
    """
    logits_BK, indices_BK = (column[:, :top_k] for column in logits_BE.sort(dim=-1, descending=True, stable=True))
    return indices_BK, logits_BK.softmax(dim=-1)


def selection_counts(indices_BK: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was chosen: each sample adds 1 to each of its K experts.

    Returns:
        counts_E (int64).
    """
    chosen = indices_BK.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=chosen.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )
