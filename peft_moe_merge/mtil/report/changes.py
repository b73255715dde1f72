"""What training changed: accuracies as differences to zero-shot, and to when a task was just learnt.

Shapes: T tasks, S seeds. `a_TT[i][j]` is the accuracy on task j after training task i, in percent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

ZERO_SHOT = "zero_shot"
"""The method that trains nothing; without its runs there is nothing to compare zero-shot with."""

Runs = list[dict[str, Any]]


def since_learnt(matrix: list[list[float]]) -> np.ndarray:
    """Tell what became of each task since it was learnt: `a[i][j] - a[j][j]`; NaN where j is not learnt yet, and at i = j.

    Args:
        matrix: T x T.

    Returns:
        Percentage points, `[T, T]`: negative is forgotten.
    """
    a_TT = np.asarray(matrix, dtype=np.float64)
    change_TT = a_TT - a_TT.diagonal()
    change_TT[np.triu_indices(len(a_TT))] = np.nan
    return change_TT


def mean_over_zero_shot(runs: Runs, zero_shot: Runs) -> np.ndarray | None:
    """Tell by how much accuracies exceed those of the untouched CLIP, in the mean over common seeds.

    Args:
        runs: of a method.
        zero_shot: of `ZERO_SHOT`.

    Returns:
        Percentage points, `[T, T]`; None if no seed is in both.
    """
    plain = {run["seed"]: np.asarray(run["matrix"], dtype=np.float64) for run in zero_shot}
    known = [np.asarray(run["matrix"], dtype=np.float64) - plain[run["seed"]] for run in runs if run["seed"] in plain]
    return np.mean(known, axis=0) if known else None
