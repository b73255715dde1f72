"""The report: statistics against closed forms, the right numbers in the tables, one page that a browser shows whole."""

import json
import math
import re
import shutil
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from rich.console import Console

from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.data.hub.table import HUB_SETS
from peft_moe_merge.mtil.report.anchors import anchor_notes
from peft_moe_merge.mtil.report.figures import draw_all
from peft_moe_merge.mtil.report.html import write_report
from peft_moe_merge.mtil.report.statistics import estimate, paired_difference
from peft_moe_merge.mtil.report.tables import matrix_rows, print_results, summary_rows, task_rows
from peft_moe_merge.mtil.results import empty_results, read_results, run_result, write_results

TASKS = ["birds", "<cars> & $x$", "digits"]
BLOCKS = ["vision_model.encoder.layers.0.mlp", "text_model.encoder.layers.0.mlp"]


def run(seed, shift=0.0, story=False):
    matrix = [[80 + shift, 30, 20], [70, 90 + shift, 26], [65, 84, 95 + shift]]
    progress = Progress(settings={}, matrix=matrix, seconds=90.0, trainable_parameters=1234, stored_bytes=5_000_000)
    if story:
        progress.losses = [[3.0, 2.0, 1.5], [2.5, 2.0, 1.8], [2.0, 1.0, 0.5]]
        progress.history = [
            {
                "merges": [[2, {block: [3, 0, 1] for block in BLOCKS}]],
                "frozen": {block: list(range(task + 1)) for block in BLOCKS},
                "usage": {block: [9, 5, 1, 0] for block in BLOCKS},
            }
            for task in range(len(TASKS))
        ]
    return run_result(seed, progress)


@pytest.fixture
def results():
    results = empty_results("mini", TASKS, {"steps": 3})
    results["methods"] = {
        "zero_shot": [run(seed) for seed in (0, 1, 2)],
        "moe_adapters": [run(seed, shift=seed) | {"merges": [[], [], []]} for seed in (0, 1, 2)],
        "moe_lora_merge": [run(seed, shift=2 * seed + 1, story=True) for seed in (0, 1, 2)],
    }
    return results


def test_estimate_against_all_resamples():
    values = [1.0, 4.0, 7.0, 20.0]
    known = estimate([*values, None])
    assert known.mean == 8.0 and known.seeds == 4
    assert known.std == pytest.approx(math.sqrt(sum((v - 8) ** 2 for v in values) / 3))
    every = np.sort([np.mean(chosen) for chosen in product(values, repeat=4)])  # all 256 resamples
    low, high = np.quantile(every, [0.025, 0.975])
    assert known.low == pytest.approx(low, abs=0.5) and known.high == pytest.approx(high, abs=0.8)
    assert estimate(values) == estimate(values), "the same values, the same interval"
    assert estimate([5.0])[:2] == (5.0, None) and estimate([None]).mean is None


def test_differences_are_taken_seed_by_seed():
    ours = [{"seed": 0, "last": 51.0}, {"seed": 1, "last": 92.0}, {"seed": 7, "last": 0.0}]
    theirs = [{"seed": 1, "last": 90.0}, {"seed": 0, "last": 50.0}]
    difference = paired_difference(ours, theirs, "last")
    assert difference.mean == 1.5 and difference.seeds == 2 and (difference.low, difference.high) == (1.0, 2.0)


def test_tables(results):
    rows = matrix_rows(TASKS, results["methods"]["zero_shot"][0])
    assert rows[1] == ["birds", "80.0", "30.0", "20.0", "43.3"]
    assert rows[4] == ["Transfer", "-", "30.0", "23.0", "26.5"]
    assert rows[6] == ["Last", "65.0", "84.0", "95.0", "81.3"]
    heading, _, adapters, ours = summary_rows(results)
    cells = dict(zip(heading, ours, strict=False))
    assert cells["Last"] == "82.33 ±0.67"  # (244 + 1, 3, 5) / 3
    assert ours[heading.index("Last") + 1].startswith("+0.67") and adapters[heading.index("Last") + 1] == ""
    console = Console(record=True, width=200)
    print_results(results, console)
    text = console.export_text()
    assert "moe_lora_merge" in text and "<cars> & $x$" in text and "seed 0" not in text, "no matrix a seed"


def test_results_are_strict_json(results, tmp_path):
    path = tmp_path / "results.json"
    write_results(path, results)
    loaded = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert loaded == read_results(path)
    entry = loaded["methods"]["moe_lora_merge"][0]
    keys = [
        "seed",
        "matrix",
        "transfer",
        "average",
        "last",
        "forgetting",
        "seconds",
        "trainable_parameters",
        "stored_bytes",
    ]
    assert set(keys) <= entry.keys() and entry["transfer_per_task"][0] is None
    path.write_text('{"suite": "mini"}')
    with pytest.raises(ValueError, match="lacks tasks, settings"):
        read_results(path)
    path.write_text("no json")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(path)


def test_the_page_stands_alone(results, tmp_path):
    *pictures, page = write_report(results, tmp_path)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == len(pictures) == 8
    loads = re.compile(r"""(src|href)\s*=\s*["']?(?!["']?data:)|url\(|@import|<script""")
    assert not loads.search(html) and loads.search("<img src='//host/a.png'>") and loads.search('<a href="b.css">')
    assert "&lt;cars&gt; &amp; $x$" in html and "<cars>" not in html
    for number in ("82.33", "26.5", "moe_adapters", "1,234"):
        assert number in html


def test_every_block_lists_its_tasks_from_the_first_down(results):
    figure = draw_all(results)["usage_moe_lora_merge"][0]
    panels = [axes for axes in figure.axes if axes.get_title() in ("vision 0", "text 0")]
    assert len(panels) == 2 and all(axes.yaxis_inverted() for axes in panels)


def test_the_report_can_be_redone(results, tmp_path):
    write_results(tmp_path / "results.json", results)
    command = [sys.executable, "-m", "peft_moe_merge.mtil.report", str(tmp_path / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "report.html" in done.stdout and (tmp_path / "report.html").stat().st_size > 50_000
    assert subprocess.run([*command[:-1], str(tmp_path / "nothing.json")], capture_output=True).returncode == 2


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to look at the page with")
def test_a_browser_shows_it_whole(results, tmp_path):
    page = write_report(results, tmp_path)[-1]
    probe = """<script>
    let errors = 0
    addEventListener('error', () => errors++, true)
    addEventListener('load', () => {
        const shown = [...document.images].filter(image => image.naturalWidth > 100).length
        document.title = `${shown} shown, ${errors} errors, wider ${document.body.scrollWidth > innerWidth}`
    })</script>"""
    page.write_text(page.read_text().replace("</head>", probe + "</head>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>8 shown, 0 errors, wider false</title>" in done.stdout, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, "the browser has nothing to complain of"


def test_published_numbers_stand_beside_those_of_the_same_tasks():
    chosen = ["mnist", "aircraft", "dtd"]
    results = empty_results("mtil", chosen, {})
    results["methods"] = {"zero_shot": [run(0)]}
    transfer, last = task_rows(results, "transfer"), task_rows(results, "last")
    assert [row[0] for row in last[2:]] == ["† CLIP untouched", "† each task alone", "† arXiv 2405.11530"]
    assert last[-1][1:] == ["98.5", "50.7", "77.0", f"{(98.5 + 50.7 + 77.0) / 3:.1f}"]
    assert transfer[2][1:] == ["-", "24.3", "44.6", f"{(24.3 + 44.6) / 2:.1f}"], "the first task has no transfer"
    assert transfer[3][1:] == ["-", "-", "39.7", "39.7"]
    assert len(task_rows(results | {"suite": "mini"}, "last")) == 2 and anchor_notes(results | {"suite": "mini"}) == []


def test_it_is_said_in_what_a_run_differs_from_the_published_ones():
    rates = [entry.lr for entry in HUB_SETS.values()]
    published = {"order": "I", "few_shot": None, "steps": 1000, "batch_size": 64, "weight_decay": 0.0, "lr": rates}
    published |= {"num_experts": 55, "top_k": 2, "r": 64, "merge_every": 100, "freeze_top_k": 2}
    published |= {"label_smoothing": 0.2, "allow_size_mismatch": False, "model": "openai/clip-vit-base-patch16"}
    results = empty_results("mtil", list(HUB_SETS), published)
    assert "The settings are the published ones." in anchor_notes(results)[0]
    for name, other in {
        "order": "II",
        "few_shot": 5,
        "lr": [1e-3],
        "model": None,
        "allow_size_mismatch": True,
    }.items():
        note = anchor_notes(results | {"settings": published | {name: other}})[0]
        assert "NOT comparable" in note and f"{name} {other!r} instead of" in note
    assert "2 tasks" in anchor_notes(results | {"tasks": ["mnist", "dtd"]})[0]
