"""The bank of one block's experts: their parameters, and which of them are frozen.

Shapes: B samples, L tokens, D input width, O output width, R bottleneck rank, E experts, G decisions, K top_k.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import MoELoraMergeConfig
from .distributed import ZeroGradients, as_in_first_process, gathered, is_sharded, overwrite
from .mixture import ACTIVATIONS, Experts, How, KnownSelection, OwnExperts, Selection, joined, mixture, token_mixture
from .pool import Expert
from .routing_losses import displacement

EXPERT_TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")
"""All tensors that an expert may have; one without an activation has no biases."""


class ExpertBank(nn.Module):
    """One block's experts, and which of them are frozen.

    Every expert has parameters of its own. So an expert that nobody selected has no gradient, and any optimizer leaves
    it alone and keeps no state for it; a frozen one is simply a parameter that requires none.

    Attributes:
        down_weight, up_weight: per expert R x D and R x O (unit by unit, see `mixture`).
        down_bias, up_bias: per expert R and O, where experts have an activation.
        frozen: bool E.
        landmark: copies of all experts from which their movement is measured, where a loss asks for it.
        sharded: every process holds a part of each expert (FSDP).
    """

    def __init__(self, config: MoELoraMergeConfig, in_features: int, out_features: int):
        super().__init__()
        shapes = ((config.r, in_features), (config.r,), (config.r, out_features), (out_features,))
        self.shapes = dict(zip(EXPERT_TENSORS, shapes, strict=True))
        if config.expert_activation == "identity":
            del self.shapes["down_bias"], self.shapes["up_bias"]
        for name in self.shapes:
            self.add_module(name, nn.ParameterList())
        self.register_buffer("frozen", torch.zeros(0, dtype=torch.bool))
        self.activation = ACTIVATIONS[config.expert_activation]
        self.init_weights = config.init_weights
        self.landmark: list[Expert] | None = None
        self.sharded = False
        self.mixture = token_mixture if config.routing == "token" else mixture
        self.grow(config.experts_at_start)

    def __len__(self) -> int:
        """Return E."""
        return len(self.down_weight)

    def grow(self, experts: int, agreed: bool = False) -> None:
        """Add so many fresh experts, `agreed` upon as in `refresh`.

        Raises:
            RuntimeError: the others are sharded.
        """
        if len(self) and is_sharded(self.down_weight[0]):
            raise RuntimeError(
                "The pool of a model that is sharded (FSDP) can't grow. Name all tasks in the config beforehand, or save the "
                "adapter, load it into a new model, add the task there and shard that."
            )
        like = self.down_weight[0] if len(self) else torch.empty(())
        for _ in range(experts):
            for name, shape in self.shapes.items():
                tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
                getattr(self, name).append(nn.Parameter(tensor, requires_grad=False))  # whose task comes, trains it
            self.frozen = torch.cat([self.frozen, self.frozen.new_zeros(1)])
            self.refresh(len(self) - 1, agreed)

    @torch.no_grad()
    def refresh(self, expert: int, agreed: bool = False) -> None:
        """Make an expert as new: it adds nothing, and may learn.

        Args:
            expert: which one.
            agreed: it is the same in all processes, which all must call.
        """
        self.frozen[expert] = False
        parameters = self.parameters_of(expert)
        if parameters[0].is_meta:
            return
        like = parameters[0]
        tensors = {
            name: torch.empty(shape, dtype=like.dtype, device=like.device) for name, shape in self.shapes.items()
        }
        nn.init.kaiming_uniform_(tensors["down_weight"], a=math.sqrt(5))
        if self.init_weights:
            nn.init.zeros_(tensors["up_weight"])
        else:
            nn.init.kaiming_uniform_(tensors["up_weight"].T, a=math.sqrt(5))
        for name in ("down_bias", "up_bias"):
            if name in tensors:
                nn.init.zeros_(tensors[name])
        for parameter, tensor in zip(parameters, tensors.values(), strict=True):
            if agreed:
                as_in_first_process(tensor)
            overwrite(parameter, tensor)

    def parameters_of(self, expert: int) -> list[nn.Parameter]:
        """Return one expert's parameters."""
        return [getattr(self, name)[expert] for name in self.shapes]

    def expert(self, index: int) -> Expert:
        """Return one expert's tensors, without gradient, sharing their memory unless they are sharded."""
        return {name: gathered(getattr(self, name)[index]) for name in self.shapes}

    def set_landmark(self) -> None:
        """Measure movement from here.

        Raises:
            ValueError: the experts are sharded.
        """
        if is_sharded(self.down_weight[0]):
            raise ValueError(
                "`router_locality_loss` needs whole experts in every process, but these are sharded (FSDP). Set it to 0, "
                "or train data parallel (DDP)."
            )
        self.landmark = [
            {name: tensor.clone() for name, tensor in self.expert(index).items()} for index in range(len(self))
        ]

    def movement(self, experts: list[int]) -> Tensor:
        """Return how far the listed experts have moved since the landmark, and 0 for all others: shape E, no gradient."""
        if self.landmark is None or len(self.landmark) != len(self):
            self.set_landmark()
        moved_E = torch.zeros(len(self), device=self.frozen.device)
        for expert in experts:
            moved_E[expert] = displacement(self.expert(expert), self.landmark[expert])
        return moved_E

    def how(self, scaling: float, dropout: float, in_place: bool = False) -> How:
        """Say what is done beside multiplying."""
        return How(self.activation, scaling, dropout, in_place)

    @property
    def banks(self) -> list[nn.ParameterList]:
        """The tensors in the order of `Experts`."""
        names = ("down_weight", "up_weight", "down_bias", "up_bias")
        return [getattr(self, name) for name in names if name in self.shapes]

    def joined(self, experts: list[int]) -> Experts:
        """Put some experts one below the other, with gradient."""
        return joined(experts, *self.banks)

    def forward(
        self,
        x_BLD: Tensor,
        selection: Selection | KnownSelection | OwnExperts,
        gates_GK: Tensor,
        how: How,
        training: bool = False,
        onto_BLO: Tensor | None = None,
    ) -> Tensor:
        experts = selection.stack(*self.banks)
        y_BLO = self.mixture(x_BLD, gates_GK, selection.positions_GK, experts, how, onto_BLO)
        if self.sharded and training and torch.is_grad_enabled() and isinstance(selection, Selection):
            y_BLO = ZeroGradients.apply(y_BLO, *self.taken_elsewhere(selection.indices_GK))
        return y_BLO

    @torch.compiler.disable
    def taken_elsewhere(self, indices_GK: Tensor) -> list[nn.Parameter]:
        """List the trainable tensors of experts that other processes take and this one does not. All must call.

        FSDP sums up the gradients that there are, so all processes must have the same ones.
        """
        chosen = indices_GK.flatten()
        taken_E = torch.zeros(len(self), dtype=torch.int32, device=chosen.device).index_fill_(0, chosen, 1)
        dist.all_reduce(taken_E)
        experts = taken_E.index_fill_(0, chosen, 0).nonzero().flatten().tolist()
        return [tensor for expert in experts for tensor in self.parameters_of(expert) if tensor.requires_grad]

    @property
    def dtype(self) -> torch.dtype:
        return self.down_weight[0].dtype
