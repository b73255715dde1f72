"""What the chosen experts make of a sample: the hot path. Pure functions on tensors.

Shapes: B samples, L tokens, D input width, O output width, R bottleneck rank, K experts a sample takes, U distinct
experts taken by anyone in the batch, G routing decisions: G = B, or G = 1 where all samples decided alike.

An expert is `relu(x A + a)`, dropout, then `B` and `b`: a low-rank adapter with a nonlinearity. Its tensors are
stored unit by unit, `down_RD` and `up_RO`, so that the K experts of a sample lie one below the other and act as one
expert of rank K R. That makes a sample's whole mixture two matrix products, whatever K is, and no other expert is
touched: cost does not grow with the number of experts.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def distinct_experts(indices_GK: Tensor) -> tuple[list[int], Tensor]:
    """List the experts that anyone takes, in ascending order, and where in that list each choice stands.

    Returns:
        experts (U of them) and positions_GK (int64) with `experts[positions_GK[g, k]] == indices_GK[g, k]`.
    """
    experts = sorted({expert for row in indices_GK.tolist() for expert in row})
    return experts, torch.searchsorted(torch.tensor(experts, device=indices_GK.device), indices_GK)


def stack(parameters: Sequence[Tensor], experts: list[int]) -> Tensor:
    """Stack one tensor of each listed expert, expert first. Only these experts get a gradient."""
    return torch.stack([parameters[expert] for expert in experts])


def mixture(
    x_BLD: Tensor,
    gates_GK: Tensor,
    positions_GK: Tensor,
    down_URD: Tensor,
    down_bias_UR: Tensor,
    up_URO: Tensor,
    up_bias_UO: Tensor,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Compute `sum_k gate_k * scaling * (dropout(relu(x A_k + a_k)) B_k + b_k)` for every sample.

    Args:
        x_BLD: the samples' tokens; all tokens of a sample take the sample's experts.
        gates_GK: weights of the K experts; one row serves every sample when G = 1.
        positions_GK: which of the U stacked experts they are.
        down_URD, down_bias_UR, up_URO, up_bias_UO: the stacked experts.
        scaling: `s`, `lora_alpha / r`.
        dropout: probability of dropping a hidden unit; 0 outside training.

    Returns:
        y_BLO.
    """
    G, K = positions_GK.shape
    R, D, O = *down_URD.shape[1:], up_URO.shape[-1]  # noqa: E741
    weights_GK = gates_GK.to(x_BLD.dtype) * scaling

    down_GHD = down_URD[positions_GK].reshape(G, K * R, D)
    bias_GH = down_bias_UR[positions_GK].reshape(G, K * R)
    up_GHO = up_URO[positions_GK].reshape(G, K * R, O)
    out_bias_GO = (weights_GK.unsqueeze(-1) * up_bias_UO[positions_GK]).sum(dim=1)
    weights_GH = weights_GK.repeat_interleave(R, dim=1)

    if G == 1 and x_BLD.shape[0] != 1:
        hidden_BLH = F.relu(F.linear(x_BLD, down_GHD[0], bias_GH[0]))
        hidden_BLH = F.dropout(hidden_BLH, dropout) * weights_GH
        return hidden_BLH @ up_GHO[0] + out_bias_GO

    hidden_BLH = F.relu(torch.baddbmm(bias_GH.unsqueeze(1), x_BLD, down_GHD.transpose(1, 2)))
    hidden_BLH = F.dropout(hidden_BLH, dropout) * weights_GH.unsqueeze(1)
    return torch.baddbmm(out_bias_GO.unsqueeze(1), hidden_BLH, up_GHO)
