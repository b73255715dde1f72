"""A linear layer whose weight is another one for every image: `W_b = W₀ + Σ_t g_bt D_t` (pure functions).

Two exact ways to the same output. Merging builds W_b and multiplies by it; what it costs is the traffic of B weights.
The output space never builds it, since `W_b x = W₀ x + Σ_t g_bt (D_t x)`; what it costs is T more products. Neither
gives gradients to the weights, which are frozen.

Shapes: B images, S tokens, T tasks, I inputs, O outputs, R rank.
"""

import torch
from torch.nn import functional as F

from .task_vectors import densify

# For how many images weights are merged at a time, how many entries of them, and the fewest output rows. On a CPU a tile
# should stay in the cache between being merged and being multiplied, but narrow products are slow; elsewhere it should fill
# the device and leave room in its memory.
TILES = {"cpu": (8, 2**20, 96)}
TILES_ELSEWHERE = (2**16, 2**27, 1)
# A tile has a multiple of so many rows: what is left over by the widths that products are computed in costs a tenth.
ROWS = 32


def output_space_is_cheaper(num_tokens: int, num_tasks: int) -> bool:
    """Choose between merging and the output space by their cost for each entry of the weight and each image.

    Merging takes 2T operations and writes and reads one number, worth `TRAFFIC` operations on present machines; the
    output space takes 2 S T operations.
    """
    traffic = 32
    return 2 * num_tokens * num_tasks < 2 * num_tasks + traffic


def ensembled_linear(
    x_BSI: torch.Tensor,
    gates_BT: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_BO: torch.Tensor,
    deltas: torch.Tensor,
    index_TK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply `W₀ + Σ_t g_bt D_t` to the tokens of each image, in whichever way is cheaper.

    Args:
        x_BSI: tokens.
        gates_BT: a weight per image and task; `gates_1T` when all images share them.
        weight_OI: W₀.
        bias_BO: the bias of each image, merged already; `bias_1O` when all images share it.
        deltas: the task vectors `[T, O, I]`, or with `index_TK` the kept values `[T, K]`.
        index_TK: where the values belong, see `sparsify`.

    Returns:
        `y_BSO`.
    """
    if torch.is_autocast_enabled(x_BSI.device.type):
        x_BSI = x_BSI.to(torch.get_autocast_dtype(x_BSI.device.type))
    gates_BT, weight_OI, bias_BO, deltas = (t.to(x_BSI.dtype) for t in (gates_BT, weight_OI, bias_BO, deltas))
    images, tokens = x_BSI.shape[:2]
    if len(gates_BT) < images:  # one weight for the whole batch: it is one long image
        x_BSI = x_BSI.flatten(0, 1)[None]
    if output_space_is_cheaper(x_BSI.shape[1], len(deltas)):
        deltas_TOI = deltas if index_TK is None else densify(deltas, index_TK, weight_OI.shape)
        y_BSO = output_space_linear(x_BSI, gates_BT[:, None], weight_OI, deltas_TOI) + bias_BO[:, None]
    else:
        y_BSO = MergedLinear.apply(x_BSI, gates_BT, weight_OI, bias_BO, deltas, index_TK)
    return y_BSO.reshape(images, tokens, -1)


def output_space_linear(
    x_BSI: torch.Tensor, gates_BST: torch.Tensor, weight_OI: torch.Tensor, deltas_TOI: torch.Tensor
) -> torch.Tensor:
    """Return `W₀ x + Σ_t g_t (D_t x)`, with gates per token or (S of size 1) per image."""
    y_BSO = F.linear(x_BSI, weight_OI)
    for gate_BS, delta_OI in zip(gates_BST.unbind(-1), deltas_TOI, strict=True):
        y_BSO = y_BSO + gate_BS[..., None] * F.linear(x_BSI, delta_OI)
    return y_BSO


def low_rank_linear(
    x_BSI: torch.Tensor,
    gates_BST: torch.Tensor,
    y_BSO: torch.Tensor,
    down_TRI: torch.Tensor,
    up_TRO: torch.Tensor,
    bias_TO: torch.Tensor,
) -> torch.Tensor:
    """Return `y + Σ_t g_t (up_tᵀ (down_t x) + bias_t)`: two products for all tasks, the gates a scale between them.

    It is written over y, the output of the pretrained layer: fresh memory of that size takes time of its own.
    """
    hidden = F.linear(x_BSI, down_TRI.flatten(0, 1).to(x_BSI.dtype))  # [B, S, T * R]
    gates_BST = gates_BST.to(hidden.dtype).expand(*hidden.shape[:-1], -1)
    scaled = (hidden.unflatten(-1, down_TRI.shape[:2]) * gates_BST[..., None]).flatten(-2)
    # The biases are one more row per task, whose hidden value is 1.
    left = torch.cat([scaled, gates_BST], dim=-1).flatten(0, -2)
    right = torch.cat([up_TRO.flatten(0, 1), bias_TO]).to(hidden.dtype)
    return y_BSO.flatten(0, -2).addmm_(left, right).view(y_BSO.shape)


class MergedLinear(torch.autograd.Function):
    """`y_b = x_b W_bᵀ + bias_b` with W_b merged a few output rows at a time, and again in the backward pass.

    D is read once for all images, by one matrix product; merged weights never exist as a whole, neither in the
    forward pass nor saved for the backward one, so that memory does not grow with B times the size of the weight.
    """

    @staticmethod
    def forward(ctx, x_BSI, gates_BT, weight_OI, bias_BO, deltas, index_TK):
        ctx.save_for_backward(x_BSI, gates_BT, weight_OI, deltas, index_TK)
        y_BSO = x_BSI.new_empty(*x_BSI.shape[:2], len(weight_OI)).copy_(bias_BO[:, None])
        for images, rows, merged, _ in merged_tiles(gates_BT, weight_OI, deltas, index_TK):
            multiply(y_BSO[images, :, rows], x_BSI[images], merged.mT, beta=1)
        return y_BSO

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_BSO):
        x_BSI, gates_BT, weight_OI, deltas, index_TK = ctx.saved_tensors
        grad_x = torch.zeros_like(x_BSI) if ctx.needs_input_grad[0] else None
        grad_gates = torch.zeros_like(gates_BT) if ctx.needs_input_grad[1] else None
        grad_bias = grad_BSO.sum(1) if ctx.needs_input_grad[3] else None
        for images, rows, merged, tile_TN in merged_tiles(gates_BT, weight_OI, deltas, index_TK):
            if grad_x is not None:
                multiply(grad_x[images], grad_BSO[images, :, rows], merged, beta=1)
            if grad_gates is not None:  # the merged weights have served, and their memory can take their gradients
                multiply(merged, grad_BSO[images, :, rows].mT, x_BSI[images], beta=0)
                grad_gates[images].addmm_(merged.flatten(1), tile_TN.T)
        return grad_x, grad_gates, None, grad_bias, None, None


def multiply(out, left, right, beta):
    """Set `out = beta * out + left @ right`, for each image."""
    if out.is_cpu:  # here one product at a time is faster than a batched one
        for own, one, other in zip(out, left, right, strict=True):
            torch.addmm(own, one, other, beta=beta, out=own)
    else:
        out.copy_(torch.baddbmm(out, left, right, beta=beta))


def merged_tiles(gates_BT, weight_OI, deltas, index_TK):
    """Yield images, output rows, their merged weights `[B, rows, I]`, and their task vectors `[T, rows * I]`.

    The merged weights are in memory that the next ones take: fresh memory for each would cost as much as merging.
    """
    outputs, inputs = weight_OI.shape
    size, entries, fewest = TILES.get(weight_OI.device.type, TILES_ELSEWHERE)
    size = min(size, len(gates_BT))
    step = entries // (size * inputs)
    step = min(outputs, max(fewest, step - step % ROWS or step))
    memory = weight_OI.new_empty(size * step * inputs)
    groups = [slice(start, min(start + size, len(gates_BT))) for start in range(0, len(gates_BT), size)]
    for rows, tile_TN in task_vector_tiles(deltas, index_TK, weight_OI.shape, step):
        base_N = weight_OI[rows].reshape(1, -1)
        for images in groups:
            gates_GT = gates_BT[images]
            merged_GN = memory[: len(gates_GT) * base_N.shape[1]].view(len(gates_GT), -1)
            torch.addmm(base_N, gates_GT, tile_TN, out=merged_GN)
            yield images, rows, merged_GN.unflatten(1, (-1, inputs)), tile_TN


def task_vector_tiles(deltas, index_TK, shape, step):
    """Yield some output rows at a time and the task vectors there, `[T, rows * I]`; sparse ones made dense for the moment."""
    outputs, inputs = shape
    tiles = [slice(start, min(start + step, outputs)) for start in range(0, outputs, step)]
    if index_TK is None or deltas.device.type != "cpu" or torch.compiler.is_compiling():
        deltas_TN = (deltas if index_TK is None else densify(deltas, index_TK, shape)).flatten(1)
        for rows in tiles:
            yield rows, deltas_TN[:, rows.start * inputs : rows.stop * inputs]
        return
    # A tile that is filled in the cache costs less than to read a dense one, or to write one of all rows, to memory.
    starts = torch.tensor([rows.start * inputs for rows in tiles] + [outputs * inputs], dtype=index_TK.dtype)
    cuts = torch.searchsorted(index_TK, starts.expand(len(index_TK), -1).contiguous()).tolist()
    memory = deltas.new_empty(len(deltas) * step * inputs)
    for number, rows in enumerate(tiles):
        tile_TN = memory[: len(deltas) * (rows.stop - rows.start) * inputs].view(len(deltas), -1).zero_()
        for tile_N, values_K, index_K, cut in zip(tile_TN, deltas, index_TK, cuts, strict=True):
            part = slice(cut[number], cut[number + 1])
            tile_N.scatter_(0, (index_K[part] - rows.start * inputs).long(), values_K[part])
        yield rows, tile_TN
