"""Which experts took part in which block, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.figure import Figure

WIDTH = 0.3  # inches of an expert's column


def gates_figure(gates: dict[str, list[float]], owners: Sequence[str] = ()) -> Figure:
    """Draw the weights of all experts, block by block; white took no part.

    Args:
        gates: per block, one weight per expert of the block. Blocks may differ in their number.
        owners: the task of each expert, where each has one.
    """
    widest = max(map(len, gates.values()))
    weights = np.full((len(gates), widest), np.nan)
    for row, of_block in enumerate(gates.values()):
        weights[row, : len(of_block)] = of_block
    figure = Figure(figsize=(max(5.0, 1.8 + WIDTH * widest), 1.5 + 0.17 * len(gates)), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("0.85")  # where a block has no such expert
    shown = axes.imshow(weights, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(gates)), [short_name(block) for block in gates], fontsize=7)
    axes.set_xticks(range(0, widest, 1 + widest // 30))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("expert")
    if owners:
        above = axes.secondary_xaxis("top")
        groups = [
            (task, [place for place, _ in of_task]) for task, of_task in groupby(enumerate(owners), lambda one: one[1])
        ]
        above.set_xticks(
            [np.mean(places) for _, places in groups], [task for task, _ in groups], rotation=30, ha="left"
        )
        above.tick_params(length=0, labelsize=8)
    axes.set_xticks(np.arange(widest + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(gates) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    figure.colorbar(shown, ax=axes, label="weight", fraction=0.05, pad=0.02)
    return figure


def short_name(block: str) -> str:
    """Name a block by its layer and module: `vision_model.encoder.layers.3.self_attn.q_proj` is `3 q_proj`."""
    parts = block.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    return f"{layer} {parts[-1]}".strip()
