"""What several seeds say: mean, spread, and the paired difference between methods with its interval.

Shapes: S seeds, B resamples. Pure functions on lists and on the runs of `results.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

BASELINE = "moe_adapters"
LEVEL = 0.95
RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values; None if there are none.
        std: the sample standard deviation; None for fewer than two values.
        low, high: bootstrap interval of the mean; None for fewer than two values.
        seeds: how many values there are.
    """

    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    seeds: int


def estimate(values: Sequence[float | None]) -> Estimate:
    """Estimate a mean, with a percentile bootstrap interval (Efron 1979) at the level `LEVEL`.

    The resamples come from a fixed seed, so the same values give the same interval. With fewer than about five values
    the interval is narrower than it should be; with three it is their range.

    Args:
        values: one per seed; None where a run has none.
    """
    known_S = np.array([value for value in values if value is not None], dtype=np.float64)
    seeds = len(known_S)
    if seeds < 2:
        return Estimate(*known_S.tolist() or [None], None, None, None, seeds)
    drawn_BS = np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))
    low, high = np.quantile(known_S[drawn_BS].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(known_S.mean()), float(known_S.std(ddof=1)), float(low), float(high), seeds)


def over_seeds(runs: Sequence[dict[str, Any]], metric: str) -> Estimate:
    """Estimate a method's metric, such as `"last"`, from its runs."""
    return estimate([run[metric] for run in runs])


def per_task(runs: Sequence[dict[str, Any]], metric: str) -> list[Estimate]:
    """Estimate a method's metric on each task."""
    return [estimate(values) for values in zip(*(run[f"{metric}_per_task"] for run in runs), strict=True)]


def paired_difference(
    runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], metric: str
) -> Estimate:
    """Estimate by how much a method exceeds a baseline, from the seeds that both ran.

    What a seed makes easy or hard for both cancels out in the difference.
    """
    theirs = {run["seed"]: run[metric] for run in baseline}
    pairs = [(run[metric], theirs.get(run["seed"])) for run in runs]
    return estimate([ours - other for ours, other in pairs if ours is not None and other is not None])


def mean_matrix(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Average the runs' accuracy matrices, task by task."""
    return np.mean([run["matrix"] for run in runs], axis=0)
