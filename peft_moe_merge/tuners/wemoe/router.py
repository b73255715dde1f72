"""Learned gates: from the tokens of an image to one weight per task.

Shapes: B images, S tokens, H width, T tasks.
"""

import torch
from torch import nn


class Router(nn.Module):
    """The router of a WEMoE block (arXiv 2402.00433): `mean over tokens of r(x)`, not normalised.

    It starts as the constant `scaling`, up to the noise of its N(0, 0.01²) weights, which makes the block task
    arithmetic.

    Args:
        width: H, the width of the block's input.
        num_tasks: T.
        depth: layers of r. 0: a learned constant; 1: `W x + b`; 2: `W₂ ReLU(W₁ x + b₁) + b₂` with H hidden units.
        scaling: where the gates start.
    """

    def __init__(self, width: int, num_tasks: int, depth: int, scaling: float, **factory) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width, **factory) if depth == 2 else None
        self.weight = nn.Parameter(torch.empty(num_tasks, width, **factory)) if depth > 0 else None
        self.bias = nn.Parameter(torch.full((num_tasks,), scaling, **factory))
        if self.hidden is not None:
            nn.init.normal_(self.hidden.weight, std=0.01)
            nn.init.zeros_(self.hidden.bias)
        if self.weight is not None:
            nn.init.normal_(self.weight, std=0.01)

    def forward(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Return `gates_BT`, computed in the router's own precision also under autocast; `gates_1T` with depth 0."""
        if self.weight is None:
            return self.bias[None]
        with torch.autocast(x_BSH.device.type, enabled=False):
            x_BSH = x_BSH.to(self.weight.dtype)
            # The last layer is linear: mean first and layer then is the same, and S times cheaper.
            if self.hidden is None:
                mean_BH = x_BSH.mean(1)
            else:
                mean_BH = self.hidden(x_BSH).relu().mean(1)
            return nn.functional.linear(mean_BH, self.weight, self.bias)


def projection_gates(x: torch.Tensor, directions_TRI: torch.Tensor, top_k: int) -> torch.Tensor:
    """Gates without training: a token goes to the tasks whose changes lie in its direction (SMILE, arXiv 2408.10174).

    The logit of a task is the length of the token's projection on the leading right singular vectors of the task's
    change to this linear layer; gates are the softmax, of which the `top_k` largest are kept and sum to 1.

    Args:
        x: tokens `[..., I]`.
        directions_TRI: R orthonormal input directions for each of T tasks.
        top_k: tasks per token, at most T.

    Returns:
        Gates `[..., T]`, of which `top_k` are not zero.
    """
    logits = torch.linalg.vector_norm(torch.einsum("...i,tri->...tr", x, directions_TRI), dim=-1)
    kept, tasks = logits.softmax(-1).topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, tasks, kept / kept.sum(-1, keepdim=True))
