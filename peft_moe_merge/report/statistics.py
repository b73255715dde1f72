"""The one rule of uncertainty of all reports: means over seeds with Student's 95 % interval.

Why this rule. Runs are few, usually three to twenty seeds. The standard deviation says how much single seeds differ, not how
well their mean is known, and a percentile bootstrap of three values is no more than their range: it covers the true mean far
less often than it says. Student's interval pays for the few seeds with its quantile (4.3 standard errors with three seeds, 2.1
with twenty) and is exact where seeds scatter normally. One seed has no interval, and none is made up.

Methods are compared seed by seed, since what a seed makes easy or hard for both cancels out in the difference, and the same
rule is applied to the differences. An interval that contains 0 does not show that two methods are equal: for that there is
`equivalence`.

Shapes: S seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
ALPHA = 0.05  # of an equivalence
RULE = "± and intervals: Student's 95 % over seeds, none for a single seed."
"""What pages and tables say of their intervals."""

Run = dict[str, Any]
Value = str | Callable[[Run], float | None]


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the values; None if there are none.
        half: half the width of its 95 % interval; None for fewer than two values.
        seeds: how many values there are.
    """

    mean: float | None
    half: float | None
    seeds: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.half is None else self.mean + self.half


class Equivalence(NamedTuple):
    """The outcome of two one-sided t tests.

    Attributes:
        p_value: the larger one of the two tests; None for fewer than two seeds.
        low, high: the 90 % interval of the mean difference; None for fewer than two seeds.
        holds: whether that interval lies inside ±margin, which is the same as p < 0.05. False for fewer than two seeds.
    """

    p_value: float | None
    low: float | None
    high: float | None
    holds: bool


def interval(values: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over seeds and half the width of its 95 % interval.

    Args:
        values: array or tensor, one value a seed along the first axis, `[S, ...]`; NaN where a seed has none.

    Returns:
        Mean and half-width, `[...]`, in float64. The mean is NaN where no seed has a value, the half-width where fewer than
        two have.
    """
    values_S = np.asarray(values, dtype=np.float64)
    known_S = np.ma.masked_invalid(values_S)
    count = known_S.count(axis=0)
    mean = np.ma.filled(known_S.mean(axis=0), np.nan)
    error = np.ma.filled(stats.mstats.sem(known_S, axis=0), np.nan)
    quantile = stats.t.ppf((1 + LEVEL) / 2, np.maximum(count - 1, 1))
    return mean, np.where(count > 1, quantile * error, np.nan)


def estimate(values: Sequence[float | None]) -> Estimate:
    """Estimate a mean with its interval.

    Args:
        values: one per seed; None or NaN where a run has none.
    """
    known_S = [value for value in values if value is not None and not np.isnan(value)]
    if not known_S:
        return Estimate(None, None, 0)
    mean, half = interval(known_S)
    return Estimate(float(mean), float(half) if len(known_S) > 1 else None, len(known_S))


def over_seeds(runs: Sequence[Run], value: Value) -> Estimate:
    """Estimate a value from a method's runs.

    Args:
        runs: one per seed.
        value: a key of the runs, such as `"last"`, or a function of a run. A run without the key has no value.
    """
    return estimate([_of(run, value) for run in runs])


def paired_differences(runs: Sequence[Run], baseline: Sequence[Run], value: Value) -> list[float]:
    """By how much each run exceeds the baseline's run with the same seed; seeds that only one of them has are left out.

    Args:
        runs: of a method, each with its `"seed"`.
        baseline: the runs of the other method.
        value: as for `over_seeds`.
    """
    theirs = {run["seed"]: _of(run, value) for run in baseline}
    pairs = [(_of(run, value), theirs.get(run["seed"])) for run in runs]
    return [ours - other for ours, other in pairs if ours is not None and other is not None]


def equivalence(differences: Sequence[float], margin: float) -> Equivalence:
    """Test whether two methods are equal but for a margin: two one-sided t tests (Schuirmann 1987) on paired differences.

    The mean difference is shown to be above -margin and below +margin, each at 5 %. Where that fails, the methods may differ
    or there may be too few seeds; it is not shown that they differ. The margin must be chosen before looking.

    Args:
        differences: one per seed.
        margin: the largest difference that does not matter, in the same unit.

    Raises:
        ValueError: the margin is not positive.
    """
    if not margin > 0:
        raise ValueError(
            f"margin={margin}: the margin of an equivalence is a positive number in the differences' unit."
        )
    if len(differences) < 2:
        return Equivalence(None, None, None, False)
    mean, error, freedom = np.mean(differences), stats.sem(differences), len(differences) - 1
    half = stats.t.ppf(1 - ALPHA, freedom) * error
    if error == 0:  # all seeds differ by the same: there is nothing left to doubt
        p_value = float(abs(mean) >= margin)
    else:
        p_value = stats.t.sf((margin - abs(mean)) / error, freedom)
    return Equivalence(float(p_value), float(mean - half), float(mean + half), bool(p_value < ALPHA))


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Test whether a mean difference is 0, by Student's paired t test, two-sided. None for fewer than two seeds.

    Args:
        differences: one per seed.
    """
    if len(differences) < 2:
        return None
    if np.ptp(differences) == 0:  # all seeds differ by the same: there is nothing left to doubt
        return float(differences[0] == 0)
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p values of several tests, so that those below 5 % hold all at once with 95 % (Holm 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may fall below its predecessor.
    """
    adjusted, floor = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = floor
    return adjusted


def _of(run: Run, value: Value) -> float | None:
    return run.get(value) if isinstance(value, str) else value(run)
