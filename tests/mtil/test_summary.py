"""The results in words: each sentence against numbers that are worked out here."""

import pytest
from scipy import stats

from peft_moe_merge.mtil.metrics.mtil import stream_metrics
from peft_moe_merge.mtil.report.changes import mean_over_zero_shot, since_learnt
from peft_moe_merge.mtil.report.summary import against_zero_shot, forgotten, ranking, summary, uncertain, winner

TASKS = ["birds", "cars", "digits"]
PLAIN = [[50.0, 40.0, 30.0]] * 3


def run(seed, matrix):
    return {"seed": seed, "matrix": matrix, **stream_metrics(matrix)}


def learnt(birds_at_end, cars_at_end=80.0, unseen=0.0):
    return [[90.0, 40.0 + unseen, 30.0], [85.0, 80.0, 30.0 + unseen], [birds_at_end, cars_at_end, 70.0]]


@pytest.fixture
def results():
    """`keeps` has Last 80, 81 and 79, `loses` 70 in all seeds, zero-shot 40."""
    keeps = [run(seed, learnt(90.0 + change)) for seed, change in enumerate((0, 3, -3))]
    loses = [run(seed, learnt(60.0, unseen=-6.0)) for seed in range(3)]
    plain = [run(seed, PLAIN) for seed in range(3)]
    return {"suite": "mini", "tasks": TASKS, "methods": {"loses": loses, "zero_shot": plain, "keeps": keeps}}


def only(results, *names, seeds=(0, 1, 2)):
    methods = {name: [one for one in results["methods"][name] if one["seed"] in seeds] for name in names}
    return results | {"methods": methods}


def test_the_best_by_last_wins_by_its_paired_lead(results):
    assert ranking(results) == ["keeps", "loses", "zero_shot"]
    half = stats.t.ppf(0.975, 2) / 3**0.5  # of 80, 81, 79, whose deviation is 1; the same for the differences to 70
    said = winner(results)
    assert said.startswith("keeps comes out first") and f"3 tasks, is 80.0 % (±{half:.1f})" in said
    assert (
        f"+10.0 points from that of loses, the second (95 % interval over 3 seeds: {10 - half:+.1f} to {10 + half:+.1f})"
        in said
    )
    assert winner(only(results, "keeps")).endswith("No other method was run.")
    assert winner(only(results, "keeps", "loses", seeds=[1])).endswith(
        "+11.0 points from that of loses, the second (one seed)."
    )
    apart = only(results, "keeps", seeds=[0])
    apart["methods"]["loses"] = results["methods"]["loses"][1:]
    assert winner(apart).endswith("loses is second, with other seeds.")
    even = only(results, "loses")
    even["methods"]["twin"] = even["methods"]["loses"]
    assert "and even with that of twin" in winner(even)


def test_gain_over_zero_shot(results):
    assert "keeps gained 40.0 points (95 %" in against_zero_shot(results)
    assert against_zero_shot(results).endswith("on tasks not learnt yet (Transfer) it is as good.")
    # Transfer of cars falls by 6, that of digits by 0 and 6: (6 + 3) / 2
    said = against_zero_shot(results, "loses")
    assert "loses gained 30.0 points" in said and "(Transfer) -4.5 (95 % interval over 3 seeds: -4.5 to -4.5)." in said
    worse = only(results, "zero_shot")
    worse["methods"]["harms"] = [run(seed, [[10.0, 40.0, 30.0]] * 3) for seed in range(3)]
    assert "harms lost 13.3 points" in against_zero_shot(worse, "harms")
    assert against_zero_shot(results, "zero_shot") == against_zero_shot(only(results, "keeps")) == ""
    apart = only(results, "zero_shot", seeds=[0])
    apart["methods"]["keeps"] = results["methods"]["keeps"][1:]
    assert against_zero_shot(apart) == "", "no seed in common"


def test_what_was_forgotten_counts_from_when_it_was_just_learnt(results):
    assert since_learnt(learnt(60.0, 82.0))[1:, :2].tolist() == [
        [-5.0, pytest.approx(float("nan"), nan_ok=True)],
        [-30.0, 2.0],
    ]
    said = forgotten(results, "loses")
    assert "15.0 points worse than when they were just learnt; birds lost most, 30.0 points" in said
    assert forgotten(results, "keeps").endswith(
        "as good as when they were just learnt; what one seed lost, others gained."
    )
    assert forgotten(only(results, "keeps", seeds=[0])).startswith("keeps forgot nothing: every task")
    better = only(results, "keeps", seeds=[1])
    assert (
        forgotten(better)
        == "keeps forgot nothing: tasks are at the end 1.5 points better than when they were just learnt."
    )
    mixed = results | {"methods": {"mixed": [run(0, learnt(94.0, 78.0))]}}
    assert "1.0 points better than when they were just learnt; cars lost most, 2.0 points" in forgotten(mixed)
    assert forgotten(results, "zero_shot") == ""
    assert forgotten({"tasks": ["a"], "methods": {"keeps": [run(0, [[1.0]])]}}) == ""


def test_what_is_uncertain(results):
    assert uncertain(results).startswith("keeps leads loses and zero_shot in every interval. The best of 3 was picked")
    assert uncertain(only(results, "keeps", "loses", seeds=[0])).startswith("keeps was run with one seed")
    near = [run(seed, learnt(90.0 + change)) for seed, change in enumerate((-3, -1, 2))]  # leads: 1, 4/3, -5/3
    close = results | {"methods": {**results["methods"], "near": near}}
    assert "These seeds don't tell keeps from near: the intervals" in uncertain(close)
    assert uncertain(only(results, "keeps")) == "", "three seeds of one method: its ± says all"
    part = only(results, "keeps")
    part["methods"]["loses"] = results["methods"]["loses"][:1]
    assert "How far loses would be with other seeds is open" in uncertain(part)


def test_the_summary_is_all_of_them_or_nothing(results):
    said = summary(results)
    assert said == [winner(results), against_zero_shot(results), forgotten(results), uncertain(results)]
    assert summary(results | {"methods": {}}) == summary(results | {"methods": {"keeps": []}}) == []


def test_changes_against_zero_shot_are_paired(results):
    plain = [run(0, PLAIN), run(1, [[20.0, 20.0, 20.0]] * 3)]
    other = [run(1, learnt(60.0)), run(2, [[0.0] * 3] * 3)]
    assert mean_over_zero_shot(other, plain).tolist() == [[70.0, 20.0, 10.0], [65.0, 60.0, 10.0], [40.0, 60.0, 50.0]]
    assert mean_over_zero_shot(other[1:], plain) is None
