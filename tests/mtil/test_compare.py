"""Two runs side by side: differences against numbers that are worked out here, and what can't be compared."""

import copy
import json
import re
import subprocess
import sys

import pytest
from scipy import stats

from peft_moe_merge.mtil.metrics.mtil import stream_metrics
from peft_moe_merge.mtil.report.__main__ import main
from peft_moe_merge.mtil.report.compare import (
    common_runs,
    comparison_page,
    comparison_rows,
    comparison_words,
    equivalence_comparison_rows,
    task_comparison_rows,
    what_differs,
)

TASKS = ["birds", "cars & <b>"]


def run(seed, birds, cars):
    matrix = [[90.0, 40.0], [birds, cars]]
    return {"seed": seed, "matrix": matrix, **stream_metrics(matrix)}


def document(methods, **settings):
    return {"suite": "mini", "tasks": TASKS, "settings": settings, "versions": {"torch": "2"}, "methods": methods}


@pytest.fixture
def a():
    return document(
        {"pool": [run(seed, 80.0, 60.0) for seed in range(3)], "old": [run(0, 10.0, 10.0)]}, lr=0.1, seeds=[0]
    )


@pytest.fixture
def b():
    """Last of the pool is 4, 5 and 6 points higher, on birds only; seed 7 has no partner."""
    pool = [run(seed, 88.0 + 2 * seed, 60.0) for seed in (2, 0, 1)] + [run(7, 0.0, 0.0)]
    return document({"new": [run(0, 1.0, 1.0)], "pool": pool}, lr=0.2, seeds=[1], extra=True)


HALF = stats.t.ppf(0.975, 2) / 3**0.5


def test_differences_are_those_of_common_seeds(a, b):
    assert list(common_runs(a, b)) == ["pool"]
    heading, pool = comparison_rows(a, b)
    cells = dict(zip(heading, pool, strict=True))
    assert (cells["seeds"], cells["Last of A"], cells["Last of B"]) == ("3", "70.00", "75.00")
    assert cells["Δ Last"] == f"+5.00 [{5 - HALF:+.2f},{5 + HALF:+.2f}]"
    assert comparison_rows(b, a)[1][-2].startswith("-5.00 [")
    birds = dict(zip(*task_comparison_rows(a, b), strict=True))
    assert birds["birds"] == f"+10.00 [{10 - 2 * HALF:+.2f},{10 + 2 * HALF:+.2f}]"
    assert birds["cars & <b>"] == "+0.00 [+0.00,+0.00]"


def test_tasks_are_matched_by_name(a, b):
    turned = copy.deepcopy(b)
    turned["tasks"] = TASKS[::-1]
    for one in turned["methods"]["pool"]:
        one["matrix"] = [row[::-1] for row in one["matrix"]]
    assert task_comparison_rows(a, turned) == task_comparison_rows(a, b)
    assert what_differs(a, turned)[1] == ["order of the tasks", "birds, cars & <b>", "cars & <b>, birds"]


def test_words(a, b):
    first, left = comparison_words(a, b)
    assert (
        first
        == f"pool: Last is 5.00 points higher in B (95 % interval over 3 seeds: {5 - HALF:+.2f} to {5 + HALF:+.2f})."
    )
    assert left == "Not compared, for want of a common seed: old only in A; new only in B."
    assert comparison_words(b, a)[0].startswith("pool: Last is 5.00 points lower in B")
    assert comparison_words(a, a)[:2] == ["pool: Last is the same in A and B.", "old: Last is the same in A and B."]
    b["methods"]["old"] = [run(0, 11.0, 12.0)]
    assert "old: Last is 1.50 points higher in B, with one seed; another seed may say otherwise." in comparison_words(
        a, b
    )
    b["methods"]["pool"] = [run(seed, 80.0 + change, 60.0) for seed, change in enumerate((-1.0, 0.0, 2.0))]
    assert comparison_words(a, b)[0].startswith(
        "pool: these seeds don't tell B from A. Last is 0.17 points higher in B ("
    )
    b["methods"]["pool"] = [run(seed, 80.0 + change, 60.0) for seed, change in enumerate((-1.0, 0.0, 1.0))]
    assert comparison_words(a, b)[0].startswith("pool: these seeds don't tell B from A."), (
        "a mean of 0 is not the same"
    )
    for of in (a, b):
        of["methods"]["twin"] = of["methods"]["pool"]
    assert "not widened for there being several" in comparison_words(a, b)[-2]


def test_what_the_runs_differ_in(a, b):
    assert what_differs(a, b) == [["", "A", "B"], ["lr", "0.1", "0.2"], ["extra", "-", "True"]], "seeds may differ"
    b["versions"], a["fingerprint"], b["fingerprint"] = {"torch": "3"}, {"data_content": "x"}, {"data_content": "y"}
    assert ["data_content", "x", "y"] in what_differs(a, b) and what_differs(a, b)[-1] == ["torch", "2", "3"]
    assert "Nothing that is recorded" in comparison_page(a, a, ("one", "two"))


def test_equality_needs_a_margin(a, b):
    assert equivalence_comparison_rows(a, b, 7.0)[1][3].startswith("equal, p=0.0")  # t = 2 sqrt(3), 2 degrees
    assert equivalence_comparison_rows(a, b, 5.5)[1][3].startswith("not shown")


def test_what_cannot_be_compared(a, b):
    with pytest.raises(ValueError, match=r"other tasks .*A has \['birds', 'cars & <b>'\], B has \['birds'\]"):
        comparison_rows(a, b | {"tasks": ["birds"]})
    b["methods"] = {"pool": [run(9, 1.0, 1.0)]}
    with pytest.raises(
        ValueError, match=r"common seed: A has \{'pool': \[0, 1, 2\], 'old': \[0\]\}, B has \{'pool': \[9\]\}"
    ):
        comparison_words(a, b)


def test_from_the_command_line(a, b, tmp_path, monkeypatch, capsys):
    for name, results in (("one", a), ("two", b), ("bare", {key: b[key] for key in ("suite", "tasks", "methods")})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    command = [sys.executable, "-m", "peft_moe_merge.mtil.report", "one", "two/results.json", "--margin", "7"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pool: Last is 5.00 points higher in B" in done.stdout and "equal, p=0.0" in done.stdout
    html = (tmp_path / "two" / "comparison.html").read_text()
    assert "A: one. B: two/results.json." in html and "cars &amp; &lt;b&gt;" in html and "equal, p=0.0" in html
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!["']?(?:data:|#))|url\(|@import|<script""", html)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report", "one", "bare", "--output_dir", "there"])
    main()
    assert (tmp_path / "there" / "comparison.html").is_file()
    for wrong, said in (
        (("one", "two", "two"), "one run has a report, two are compared; got 3"),
        (("one", "two", "--baseline", "pool"), "--baseline is for methods of one run"),
        (("one", "nowhere"), "No such file"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *wrong])
        with pytest.raises(SystemExit) as left:
            main()
        assert left.value.code == 2 and said in capsys.readouterr().err
