"""What the chosen experts make of a sample: the hot path. Pure functions on tensors.

Shapes: B samples, L tokens, D input width, O output width, R bottleneck rank, K experts a sample takes, U distinct
experts taken by anyone in the batch, G routing decisions: G = B, or G = 1 where all samples decided alike. Where tokens
decide for themselves, B of them, L = 1, and S = B K pairs of a token and one of its experts.

An expert is `activation(x A + a)`, dropout, then `B` and `b`: a low-rank adapter with a nonlinearity, or without one and
without biases. Its tensors are stored unit by unit, `down_RD` and `up_RO`, so that the K experts of a sample lie one below
the other and act as one expert of rank K R. That makes a sample's whole mixture two matrix products, whatever K is, and no
other expert is touched: cost does not grow with the number of experts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation | None] = {
    "relu": F.relu,
    "identity": None,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": F.tanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}
"""What may stand between an expert's two matrices, by the name used in `MoELoraMergeConfig.expert_activation`."""


class Experts(NamedTuple):
    """The tensors of U experts, stacked.

    Attributes:
        down: U x R x D.
        up: U x R x O.
        down_bias, up_bias: U x R and U x O; None for experts without biases.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None


class How(NamedTuple):
    """What is done with experts beside multiplying: the same in every call of a layer.

    Attributes:
        activation: of the hidden units; None for none.
        scaling: `s`, `lora_alpha / r`.
        dropout: probability of dropping a hidden unit; 0 outside training.
        in_place: what the mixture is added to may be overwritten: nobody else has it.
    """

    activation: Activation | None = F.relu
    scaling: float = 1.0
    dropout: float = 0.0
    in_place: bool = False

    def hidden(self, x: Tensor) -> Tensor:
        """Apply activation and dropout to hidden units."""
        x = x if self.activation is None else self.activation(x)
        return F.dropout(x, self.dropout) if self.dropout else x


class Selection:
    """Which experts a batch takes: known to the device at once, to the host when it asks.

    The host has to know, since every expert is a set of parameters of its own, and only those of selected experts may get
    a gradient. The copy to it starts here, and nobody waits for it before `stack` is called: what is launched in between
    keeps a GPU busy meanwhile.

    Args:
        indices_GK: the experts that each decision takes.
        num_experts: E.
        by_token: a decision is a token's, and there are many.

    Attributes:
        indices_GK: as given.
        positions_GK: where among the stacked experts they stand; None when these are the K of the first decision, then the
            K of the second, and so on, U = G K.
    """

    def __init__(self, indices_GK: Tensor, num_experts: int, by_token: bool = False):
        graph = torch.compiler.is_compiling()
        self._everything = torch.compiler.is_exporting() or (graph and by_token and not torch.is_grad_enabled())
        self.indices_GK = indices_GK
        if self._everything:
            self.positions_GK: Tensor | None = indices_GK
        elif not torch.is_grad_enabled() and not by_token:
            # one copy of the weights instead of two, of the distinct experts and of each decision's
            self.positions_GK = None
            self._chosen = indices_GK if graph else HostCopy(indices_GK)  # a graph looks for itself
        else:
            taken_E = torch.zeros(num_experts, dtype=torch.bool, device=indices_GK.device)
            taken_E = taken_E.scatter_(0, indices_GK.flatten(), True)
            # counted on the device: to look them up in a list would need the list there, and so a wait for the host
            self.positions_GK = (taken_E.cumsum(0) - 1)[indices_GK]
            self._taken_E = taken_E if graph else HostCopy(taken_E)

    def stack(self, *banks: Sequence[Tensor]) -> Experts:
        """From each bank, one tensor per expert, stack those of the U experts. Only these get a gradient."""
        if self._everything:
            return Experts(*(torch.stack(list(bank)) for bank in banks))
        if self.positions_GK is not None:
            return Experts(*self._stack_distinct(*banks))
        if isinstance(self._chosen, Tensor):
            return Experts(*(stack_chosen(list(bank), self._chosen) for bank in banks))
        chosen = [expert for row in self._chosen.tolist() for expert in row]
        return Experts(*(torch.stack(tensors_of(bank, chosen)) for bank in banks))

    @torch.compiler.disable  # a graph made for the experts of one batch would have to be made anew for the next
    def _stack_distinct(self, *banks: Sequence[Tensor]) -> tuple[Tensor, ...]:
        experts = [expert for expert, taken in enumerate(self._taken_E.tolist()) if taken]
        return tuple(torch.stack(tensors_of(bank, experts)) for bank in banks)


class KnownSelection:
    """A selection that the host knows beforehand, since tasks take all of their own experts. Nothing is waited for.

    Args:
        experts: what each task in the batch takes.
        indices_GK: the experts that each decision takes.
    """

    def __init__(self, experts: Sequence[Sequence[int]], indices_GK: Tensor):
        self.experts = sorted({expert for task in experts for expert in task})
        known_U = torch.tensor(self.experts, device=indices_GK.device)
        self.positions_GK: Tensor | None = torch.searchsorted(known_U, indices_GK)

    def stack(self, *banks: Sequence[Tensor]) -> Experts:
        """Stack the U experts."""
        return Experts(*(torch.stack(tensors_of(bank, self.experts)) for bank in banks))


class OwnExperts:
    """A selection where samples of several tasks take all experts of their own task: nothing has to be looked for.

    Args:
        experts: the K experts of each task in the batch.
        position_G: which of these tasks each sample has.
    """

    positions_GK = None  # stacked sample by sample

    def __init__(self, experts: Sequence[Sequence[int]], position_G: Tensor):
        self.experts = experts
        self.position_G = position_G

    def stack(self, *banks: Sequence[Tensor]) -> Experts:
        """Stack the K experts of each sample, U = G K."""
        everything = [expert for task in self.experts for expert in task]
        of_tasks = (torch.stack(tensors_of(bank, everything)).unflatten(0, (len(self.experts), -1)) for bank in banks)
        return Experts(*(tensor.index_select(0, self.position_G).flatten(0, 1) for tensor in of_tasks))


def tensors_of(bank: Sequence[Tensor], experts: Sequence[int]) -> list[Tensor]:
    """Take some experts' tensors. A `ParameterList` keeps them by name, which is several times as fast as by index."""
    if isinstance(bank, nn.ParameterList):
        return [getattr(bank, str(expert)) for expert in experts]
    return [bank[expert] for expert in experts]


def joined(experts: Sequence[int], *banks: Sequence[Tensor]) -> Experts:
    """From each bank, one tensor per expert, put those of the experts named one below the other, as if they were one
    expert; a single one is not even copied."""
    if len(experts) == 1:
        return Experts(*(bank[experts[0]] for bank in banks))
    return Experts(*(torch.cat([bank[expert] for expert in experts]) for bank in banks))


class HostCopy:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor.to("cpu", non_blocking=tensor.is_cuda)
        self._arrived = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> list:
        """Wait until it has arrived, and only that long."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor.tolist()


@torch.library.custom_op("peft_moe_merge::stack_chosen", mutates_args=())
def stack_chosen(parameters: Sequence[Tensor], indices_GK: Tensor) -> Tensor:
    """Stack one tensor of each chosen expert. To a compiler this is one opaque operation, of a known shape."""
    return torch.stack([parameters[expert] for expert in indices_GK.flatten().tolist()])


@stack_chosen.register_fake
def _(parameters: Sequence[Tensor], indices_GK: Tensor) -> Tensor:
    return parameters[0].new_empty(indices_GK.numel(), *parameters[0].shape)


def add_fixed_mixture(y: Tensor, x: Tensor, gates: Tensor | None, experts: Experts, how: How) -> Tensor:
    """Add to `y` what U experts make of `x` where all samples take all of them: no expert has to be looked for.

    Args:
        y: the base layer's output, ... x O.
        x: what the experts read, ... x D.
        gates: weights of the U experts, of a shape that fits ... x U; None for a single expert of weight 1.
        experts: the U experts, one below the other, so that they act as one of U R hidden units, see `joined`.
        how: activation, scale, dropout.
    """
    down_HD, up_HO, H = experts.down, experts.up, len(experts.down)
    hidden = how.hidden(F.linear(x, down_HD, experts.down_bias))
    if gates is not None:  # each of the U gates is that of the R hidden units of its expert
        U = gates.shape[-1]
        hidden = (hidden.view(*hidden.shape[:-1], U, H // U) * gates.to(hidden.dtype).unsqueeze(-1)).view(hidden.shape)
    up_HO = up_HO.to(hidden.dtype)
    flat, added = y.reshape(-1, y.shape[-1]), hidden.reshape(-1, H)
    if flat.dtype == added.dtype:
        add = flat.addmm_ if how.in_place else flat.addmm  # which copies first
        y = add(added, up_HO, alpha=how.scaling).view(y.shape)
    else:
        y = y + (added @ up_HO * how.scaling).reshape(y.shape).to(y.dtype)
    if experts.up_bias is not None:
        bias = experts.up_bias if gates is None else gates.to(experts.up_bias.dtype) @ experts.up_bias.view(U, -1)
        y = y + (bias * how.scaling).to(y.dtype)
    return y


def mixture(
    x_BLD: Tensor,
    gates_GK: Tensor,
    positions_GK: Tensor | None,
    experts: Experts,
    how: How,
    onto_BLO: Tensor | None = None,
) -> Tensor:
    """Compute `sum_k gate_k * scaling * (dropout(activation(x A_k + a_k)) B_k + b_k)` for every sample.

    Args:
        x_BLD: the samples' tokens; all tokens of a sample take the sample's experts.
        gates_GK: weights of the K experts; one row serves every sample when G = 1.
        positions_GK: which of the U stacked experts they are; None when they are stacked in this very order.
        experts: the stacked experts.
        how: activation, scale, dropout.
        onto_BLO: what it is added to, if anything.

    Returns:
        y_BLO.
    """
    G, K = gates_GK.shape
    U, R, D = experts.down.shape
    O = experts.up.shape[-1]  # noqa: E741
    weights_GK = gates_GK.to(x_BLD.dtype) * how.scaling

    if G == 1:
        # The stacked experts are those of the one decision, in another order: reorder the weights, not the experts.
        weights_U = weights_GK[0]
        if positions_GK is not None:  # added up: two columns of a router may lead to one expert
            weights_U = weights_U.new_zeros(U).index_add(0, positions_GK[0], weights_U)
        bias_H = None if experts.down_bias is None else experts.down_bias.reshape(U * R)
        hidden_BLH = how.hidden(F.linear(x_BLD, experts.down.reshape(U * R, D), bias_H))
        y_BLO = (hidden_BLH * weights_U.repeat_interleave(R)) @ experts.up.reshape(U * R, O)
        return plus(onto_BLO, y_BLO if experts.up_bias is None else y_BLO + weights_U @ experts.up_bias)

    if positions_GK is not None:
        # `index_select`, whose gradient is summed row by row; that of indexing is summed number by number
        chosen = positions_GK.flatten()
        experts = Experts(*(tensor if tensor is None else tensor.index_select(0, chosen) for tensor in experts))
    down_GHD, up_GHO = experts.down.reshape(G, K * R, D), experts.up.reshape(G, K * R, O)
    weights_GH = weights_GK.repeat_interleave(R, dim=1)
    if experts.down_bias is None:
        hidden_BLH = how.hidden(torch.bmm(x_BLD, down_GHD.transpose(1, 2))) * weights_GH.unsqueeze(1)
        if onto_BLO is not None and onto_BLO.dtype == hidden_BLH.dtype == up_GHO.dtype:
            add = onto_BLO.baddbmm_ if how.in_place else onto_BLO.baddbmm  # less to write than a sum afterwards
            return add(hidden_BLH, up_GHO)
        return plus(onto_BLO, torch.bmm(hidden_BLH, up_GHO))
    out_bias_GO = (weights_GK.unsqueeze(-1) * experts.up_bias.reshape(G, K, O)).sum(dim=1)
    bias_GH = experts.down_bias.reshape(G, K * R)
    hidden_BLH = how.hidden(torch.baddbmm(bias_GH.unsqueeze(1), x_BLD, down_GHD.transpose(1, 2)))
    return plus(onto_BLO, torch.baddbmm(out_bias_GO.unsqueeze(1), hidden_BLH * weights_GH.unsqueeze(1), up_GHO))


def plus(onto: Tensor | None, y: Tensor) -> Tensor:
    """Add to the base layer's output, in its precision."""
    return y if onto is None else onto + y.to(onto.dtype)


def token_mixture(
    x_BLD: Tensor,
    gates_BK: Tensor,
    positions_BK: Tensor,
    experts: Experts,
    how: How,
    onto_BLO: Tensor | None = None,
) -> Tensor:
    """Compute what `mixture` does where every token is a sample of its own, L = 1.

    To give each of many tokens its own copy of its experts would be absurd. Instead the tokens are sorted by expert, each
    expert works through its tokens in one product, and the results go back to where the tokens were.
    """
    B, K = positions_BK.shape
    position_S, order_S = positions_BK.flatten().sort(stable=True)
    token_S = order_S // K
    ends_U = torch.searchsorted(position_S, torch.arange(len(experts.down), device=position_S.device), right=True)
    weights_S = (gates_BK.to(x_BLD.dtype) * how.scaling).flatten()[order_S]

    hidden_SR = grouped_product(x_BLD.squeeze(1).index_select(0, token_S), experts.down, ends_U)
    if experts.down_bias is not None:
        hidden_SR = hidden_SR + experts.down_bias.index_select(0, position_S)
    y_SO = grouped_product(how.hidden(hidden_SR), experts.up.transpose(1, 2), ends_U)
    if experts.up_bias is not None:
        y_SO = y_SO + experts.up_bias.index_select(0, position_S)
    y_SO = y_SO * weights_S.unsqueeze(1)
    return plus(onto_BLO, y_SO.new_zeros(B, y_SO.shape[-1]).index_add(0, token_S, y_SO).unsqueeze(1))


def grouped_product(x_SD: Tensor, weight_UOD: Tensor, ends_U: Tensor) -> Tensor:
    """Multiply each of U groups of rows by its own weights: rows up to `ends_U[0]` by the first, and so on."""
    if torch.is_autocast_enabled(x_SD.device.type):
        dtype = torch.get_autocast_dtype(x_SD.device.type)
        x_SD, weight_UOD = x_SD.to(dtype), weight_UOD.to(dtype)
    kernel = getattr(F, "grouped_mm", None)  # torch 2.10 and later, for rows that fill multiples of 16 bytes
    aligned = all(width * x_SD.element_size() % 16 == 0 for width in weight_UOD.shape[1:])
    if kernel is not None and aligned and x_SD.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return kernel(x_SD, weight_UOD.transpose(1, 2), offs=ends_U.to(torch.int32))
    groups = zip(x_SD.tensor_split(ends_U[:-1].tolist()), weight_UOD.unbind(), strict=True)
    return torch.cat([F.linear(rows, weight_OD) for rows, weight_OD in groups])
