"""The two sentences that a run ends with, against numbers that are worked out here."""

from pathlib import Path

import pytest

from peft_moe_merge.mtil.metrics.mtil import stream_metrics
from peft_moe_merge.mtil.report.closing import closing

PAGE = Path("runs/demo/report.html")


def run(seed, matrix):
    return {"seed": seed, "matrix": matrix, **stream_metrics(matrix)}


PLAIN = [[50.0, 40.0]] * 2  # Last 45
FORGETS = [[90.0, 40.0], [84.0, 80.0]]  # Last 82, 6 lost
KEEPS = [[80.0, 40.0], [80.0, 78.0]]  # Last 79


def told(**methods):
    runs = {name: [run(seed, matrix) for seed, matrix in enumerate(matrices)] for name, matrices in methods.items()}
    return closing({"suite": "mini", "tasks": ["birds", "cars"], "methods": runs}, PAGE)


def test_the_best_by_last_against_zero_shot_and_since_learnt():
    learnt, opened = told(zero_shot=[PLAIN], keeps=[KEEPS], forgets=[FORGETS])
    assert learnt == (
        "forgets gets 82.0 % right in the mean over 2 tasks, 37.0 points above the untouched CLIP, and has since lost "
        "6.0 points of what each task had when it was just learnt (one seed)."
    )
    assert opened.startswith("Open runs/demo/report.html ") and opened.count(".") == 2  # a name, and its own end
    learnt, _ = told(zero_shot=[PLAIN], keeps=[KEEPS])
    assert "keeps gets 79.0 %" in learnt and "34.0 points above" in learnt and "lost nothing" in learnt


def test_several_seeds_are_means():
    learnt, _ = told(zero_shot=[PLAIN, PLAIN], both=[FORGETS, KEEPS])  # Last 82 and 79, lost 6 and 0
    assert "80.5 %" in learnt and "35.5 points above" in learnt and "lost 3.0 points" in learnt
    assert learnt.endswith("(means over 2 seeds).")


def test_what_was_not_run_is_not_said():
    assert "untouched" not in told(keeps=[KEEPS])[0]
    one = closing({"tasks": ["birds"], "methods": {"keeps": [run(0, [[70.0]])]}}, PAGE)[0]
    assert one == "keeps gets 70.0 % right in the mean over one task (one seed)."
    assert len(closing({"tasks": ["birds"], "methods": {}}, PAGE)) == 1


@pytest.mark.parametrize(
    ("methods", "words"), [({}, "the only method run"), ({"harms": [[[10.0, 0.0]] * 2]}, "which no method surpassed")]
)
def test_where_nothing_was_learnt_it_says_so(methods, words):
    learnt, _ = told(zero_shot=[PLAIN], **methods)
    assert learnt == f"The untouched CLIP, {words}, gets 45.0 % right in the mean over 2 tasks (one seed)."


def test_as_good_as_zero_shot():
    assert "as the untouched CLIP does" in told(ties=[PLAIN], zero_shot=[PLAIN])[0]
