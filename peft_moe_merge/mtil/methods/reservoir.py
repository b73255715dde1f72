"""Which of a stream's images stay, where only so many can."""

from __future__ import annotations

import torch


def reservoir(kept: int, new: int, size: int, seen: int, generator: torch.Generator) -> list[int]:
    """Choose among what is kept and what comes in, so that everything ever seen has the same chance to be there.

    Vitter's algorithm R (Random sampling with a reservoir, 1985): while there is room all stay; then the n-th image takes
    the place of a random one with probability size / n.

    Args:
        kept: how many there are.
        new: how many come in, one after another.
        size: how many can be kept.
        seen: how many have come in before.
        generator: draws.

    Returns:
        Rows of the kept ones followed by the new ones.
    """
    rows = list(range(kept))
    for row in range(kept, kept + new):
        seen += 1
        if len(rows) < size:
            rows.append(row)
        elif (place := int(torch.randint(seen, (), generator=generator))) < size:
            rows[place] = row
    return rows
