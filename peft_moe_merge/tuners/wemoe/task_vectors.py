"""Three ways to store the task vectors of a linear layer: whole, sparse, and of low rank (pure functions).

Shapes: T tasks, O outputs, I inputs, K kept entries, R rank.
"""

import torch


def kept_entries(numel: int, sparsity: float) -> int:
    """Return how many of `numel` entries stay when the share `sparsity` is dropped (at least one)."""
    return max(1, round((1.0 - sparsity) * numel))


def sparsify(deltas_TOI: torch.Tensor, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the entries of largest magnitude of each task (E-WEMoE, arXiv 2410.21804), without rescaling.

    Returns:
        `values_TK` and their ascending flat positions `index_TK` (int32).
    """
    flat_TN = deltas_TOI.flatten(1)
    index_TK = flat_TN.abs().topk(kept_entries(flat_TN.shape[1], sparsity), dim=1, sorted=False).indices.sort(1).values
    return flat_TN.gather(1, index_TK), index_TK.to(torch.int32)


def densify(values_TK: torch.Tensor, index_TK: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `sparsify`: the task vectors `[T, *shape]` with zeros where nothing was kept."""
    dense_TN = values_TK.new_zeros(values_TK.shape[0], shape.numel())
    return dense_TN.scatter_(1, index_TK.long(), values_TK).view(-1, *shape)


def truncate(deltas_TOI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of each task vector by one of rank `rank`.

    It comes from the eigenvectors of the smaller Gram matrix, in float64: for some hundred matrices of an MLP's size
    this takes a fraction of a full decomposition, and squaring the condition number costs accuracy only in components
    below 1e-8 of the largest. Components that are no more than rounding, as in the task vector of a LoRA, are zero.

    Returns:
        `down_TRI`, right singular vectors by descending singular value, and `up_TRO`, left ones times singular
        values, with `deltas_TOI ≈ up_TROᵀ · down_TRI`.
    """
    outputs, inputs = deltas_TOI.shape[1:]
    rounding = max(1e-8, max(outputs, inputs) * torch.finfo(deltas_TOI.dtype).eps)
    down_TRI = deltas_TOI.new_zeros(len(deltas_TOI), rank, inputs)
    up_TRO = deltas_TOI.new_zeros(len(deltas_TOI), rank, outputs)
    for delta_OI, down_RI, up_RO in zip(deltas_TOI.double(), down_TRI, up_TRO, strict=True):
        tall = delta_OI if inputs <= outputs else delta_OI.T
        basis = torch.linalg.eigh(tall.T @ tall).eigenvectors.flip(1)[:, :rank].T  # [r, the smaller side]
        image = basis @ tall.T  # [r, the larger side]: singular values times singular vectors
        length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        present = length > rounding * length.amax()
        basis = basis * present
        image = image * present
        if inputs <= outputs:
            down, up = basis, image
        else:
            down, up = image / length.where(present, torch.ones_like(length)), basis * length
        down_RI[: len(down)] = down
        up_RO[: len(up)] = up
    return down_TRI, up_TRO


def truncate_factors(factors: list[tuple[torch.Tensor, torch.Tensor]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `truncate` does to products `up_OK · down_KI` that are given by their factors, and never built.

    Returns:
        `down_TRI` and `up_TRO`, as `truncate` returns them.
    """
    outputs, inputs = len(factors[0][0]), factors[0][1].shape[1]
    down_TRI = factors[0][0].new_zeros(len(factors), rank, inputs)
    up_TRO = factors[0][0].new_zeros(len(factors), rank, outputs)
    for (up_OK, down_KI), down_RI, up_RO in zip(factors, down_TRI, up_TRO, strict=True):
        if down_KI.shape[0] == 0:
            continue
        left_OK, left_KK = torch.linalg.qr(up_OK.double())
        right_IK, right_KK = torch.linalg.qr(down_KI.double().T)
        turn, sizes, back = torch.linalg.svd(left_KK @ right_KK.T)
        rounding = max(1e-8, max(outputs, inputs) * torch.finfo(up_OK.dtype).eps)
        kept = (sizes > rounding * sizes.amax())[:rank]
        sizes_R, places = sizes[:rank][kept], range(int(kept.sum()))
        down_RI[places] = (back[:rank][kept] @ right_IK.T).to(down_RI)
        up_RO[places] = (sizes_R[:, None] * (left_OK @ turn[:, :rank][:, kept]).T).to(up_RO)
    return down_TRI, up_TRO
