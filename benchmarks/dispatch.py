"""A mixture of experts as it is commonly written, which step_time.py times ours against.

Shapes: B samples, L tokens, D width, E experts, K chosen, S = B K pairs of a sample and an expert.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel


class Dispatch(nn.Module):
    """A mixture of experts as it is commonly written: gather the samples, call expert after expert, put them back."""

    def __init__(self, width: int, num_experts: int, top_k: int = 2, r: int = 64, scaling: float = 0.1):
        super().__init__()
        self.top_k, self.scaling = top_k, scaling
        self.router = nn.Parameter(torch.zeros(width, num_experts))
        self.noise = nn.Parameter(torch.zeros(width, num_experts))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, r), nn.ReLU(), nn.Dropout(0.1), nn.Linear(r, width))
            for _ in range(num_experts)
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        logits_BE = x_BLD[:, 0] @ self.router
        if self.training:
            logits_BE = logits_BE + torch.randn_like(logits_BE) * (F.softplus(x_BLD[:, 0] @ self.noise) + 0.01)
        logits_BK, indices_BK = logits_BE.topk(self.top_k)
        expert_S, order_S = indices_BK.flatten().sort(stable=True)
        sample_S = order_S // self.top_k
        counts_E = torch.bincount(expert_S, minlength=len(self.experts)).tolist()
        pieces = x_BLD[sample_S].split(counts_E)
        y_SLD = torch.cat([expert(piece) for expert, piece in zip(self.experts, pieces, strict=True)])
        gates_S = logits_BK.softmax(dim=-1).flatten()[order_S] * self.scaling
        y_SLD = y_SLD * gates_S[:, None, None].to(y_SLD.dtype)
        return torch.zeros_like(x_BLD, dtype=y_SLD.dtype).index_add(0, sample_S, y_SLD)


def add_dispatch(clip: CLIPModel, num_experts: int) -> CLIPModel:
    """Put a `Dispatch` beside every MLP block: `y = x + MLP(LN2(x)) + MoE(x)`."""
    clip.requires_grad_(False)
    clip.mixtures = nn.ModuleList()
    for tower in (clip.vision_model, clip.text_model):
        for block in tower.encoder.layers:
            mixture = Dispatch(block.embed_dim, num_experts)
            clip.mixtures.append(mixture)
            stream: list[Tensor] = []
            block.layer_norm2.register_forward_pre_hook(
                partial(lambda stream, _, args: stream.append(args[0]), stream)
            )
            block.mlp.register_forward_hook(
                partial(lambda mixture, stream, _, args, y_BLD: y_BLD + mixture(stream.pop()), mixture, stream)
            )
    return clip
