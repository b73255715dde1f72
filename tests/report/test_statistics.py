"""The rule of uncertainty against scipy's own intervals and tests, closed forms and what it promises about coverage."""

import numpy as np
import pytest
import torch
from scipy import stats

from peft_moe_merge.report.statistics import (
    equivalence,
    estimate,
    holm,
    interval,
    over_seeds,
    paired_differences,
    paired_p_value,
)


@pytest.mark.parametrize("seeds", [2, 3, 12])
def test_intervals_are_students(seeds):
    values = torch.randn(seeds, 4, 3, generator=torch.Generator().manual_seed(seeds), dtype=torch.float64)
    mean, half = interval(values)
    known = stats.ttest_1samp(values.numpy(), 0).confidence_interval(0.95)
    np.testing.assert_allclose(mean - half, known.low)
    np.testing.assert_allclose(mean + half, known.high)
    one = estimate(values[:, 2, 1].tolist())
    assert (one.low, one.high) == pytest.approx((known.low[2, 1], known.high[2, 1])) and one.seeds == seeds


def test_three_seeds_by_hand():
    known = estimate([1.0, 2.0, 6.0])  # variance 7, t(2) at 97.5 % is 4.3027
    assert known.mean == 3.0 and known.half == pytest.approx(4.30265 * (7 / 3) ** 0.5, rel=1e-5)


def test_one_seed_has_a_mean_and_no_interval():
    assert estimate([5.0]) == (5.0, None, 1) and estimate([5.0]).low is None
    assert estimate([None, float("nan")]) == (None, None, 0)
    assert estimate([1.0, None, 3.0, float("nan")]) == estimate([1.0, 3.0])


def test_seeds_without_a_value_are_left_out_place_by_place():
    nan = float("nan")
    mean, half = interval([[1.0, nan, nan], [nan, nan, nan], [3.0, 2.0, nan]])
    assert mean[0] == 2.0 and half[0] == pytest.approx(estimate([1.0, 3.0]).half)
    assert mean[1] == 2.0 and np.isnan(half[1]) and np.isnan(mean[2])


def test_the_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(10, 3, (3, 20_000))
    mean, half = interval(draws)
    assert (np.abs(mean - 10) <= half).mean() == pytest.approx(0.95, abs=0.005)


def test_differences_are_taken_seed_by_seed():
    ours = [{"seed": 0, "last": 51.0}, {"seed": 1, "last": 92.0}, {"seed": 7, "last": 0.0}, {"seed": 8}]
    theirs = [{"seed": 1, "last": 90.0}, {"seed": 0, "last": 50.0}, {"seed": 8, "last": 1.0}]
    assert paired_differences(ours, theirs, "last") == [1.0, 2.0]
    assert paired_differences(ours, theirs, lambda run: 2 * run["seed"]) == [0, 0, 0]
    assert over_seeds(ours, "last").mean == pytest.approx(143 / 3) and over_seeds(ours, "last").seeds == 3


@pytest.mark.parametrize("shift", [-1.2, -0.3, 0.0, 0.6])
def test_equivalence_is_two_one_sided_tests(shift):
    differences = np.random.default_rng(1).normal(shift, 0.5, 8)
    below = stats.ttest_1samp(differences, 1.0, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -1.0, alternative="greater").pvalue
    tested = equivalence(list(differences), 1.0)
    assert tested.p_value == pytest.approx(max(below, above))
    known = stats.ttest_1samp(differences, 0).confidence_interval(0.9)
    assert (tested.low, tested.high) == pytest.approx((known.low, known.high))
    assert tested.holds == (known.low > -1 and known.high < 1) == (abs(shift) < 1 and tested.p_value < 0.05)


def test_equivalence_needs_seeds_and_a_margin():
    assert equivalence([0.0], 1.0) == (None, None, None, False)
    assert equivalence([0.25, 0.25], 1.0).holds and not equivalence([1.0, 1.0], 1.0).holds
    assert not equivalence([-3.0, 3.0], 1.0).holds, "a mean of 0 is not enough"
    with pytest.raises(ValueError, match="margin=0: the margin of an equivalence is a positive number"):
        equivalence([0.0, 0.0], 0)
    with pytest.raises(ValueError, match="margin=nan"):
        equivalence([0.0, 0.0], float("nan"))


def test_methods_at_the_margin_are_called_equal_as_rarely_as_it_says():
    draws = np.random.default_rng(2).normal(1.0, 0.3, (2000, 5))
    called = np.mean([equivalence(list(differences), 1.0).holds for differences in draws])
    assert called == pytest.approx(0.05, abs=0.015)


def test_holm_is_its_definition():
    """Sorted, the k-th of m is multiplied by m - k + 1; none is smaller than one before it, none above 1."""
    p_values = [0.01, 0.04, 0.03, 0.005, 0.9]
    adjusted = holm(p_values)
    assert adjusted == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([]) == [] and holm([0.4, 0.8, 0.7]) == pytest.approx([1.0, 1.0, 1.0])


def test_the_paired_p_value_is_that_of_the_interval():
    """A difference is significant at 5 % just where its 95 % interval excludes 0."""
    generator = np.random.default_rng(0)
    seen = set()
    for shift in np.linspace(0, 2, 12):
        differences = list(generator.normal(shift, 1, 5))
        known, p_value = estimate(differences), paired_p_value(differences)
        excluded = known.low > 0 or known.high < 0
        assert (p_value < 0.05) == excluded
        seen.add(excluded)
    assert seen == {True, False}
    assert paired_p_value([1.0]) is None and paired_p_value([1.0, 1.0]) == 0.0 and paired_p_value([0.0, 0.0]) == 1.0
