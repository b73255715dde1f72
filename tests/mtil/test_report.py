"""The report: the right numbers in the tables, one page that a browser shows whole."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from rich.console import Console

from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.data.hub.table import HUB_SETS
from peft_moe_merge.mtil.report.anchors import anchor_notes
from peft_moe_merge.mtil.report.change_maps import change_maps
from peft_moe_merge.mtil.report.html import report_page, write_report
from peft_moe_merge.mtil.report.pictures import draw_all
from peft_moe_merge.mtil.report.summary import summary
from peft_moe_merge.mtil.report.tables import (
    difference_rows,
    equivalence_rows,
    matrix_rows,
    print_results,
    summary_rows,
    task_rows,
)
from peft_moe_merge.mtil.results import empty_results, read_results, run_result, write_results

TASKS = ["birds", "<cars> & $x$", "digits"]
BLOCKS = ["vision_model.encoder.layers.0.mlp", "text_model.encoder.layers.0.mlp"]


def run(seed, shift=0.0, inside=False):
    matrix = [[80 + shift, 30, 20], [70, 90 + shift, 26], [65, 84, 95 + shift]]
    progress = Progress(settings={}, matrix=matrix, seconds=90.0, trainable_parameters=1234, stored_bytes=5_000_000)
    if inside:
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
        "moe_lora_merge": [run(seed, shift=2 * seed + 1, inside=True) for seed in (0, 1, 2)],
    }
    return results


def test_tables(results):
    rows = matrix_rows(TASKS, results["methods"]["zero_shot"][0])
    assert rows[1] == ["birds", "80.0", "30.0", "20.0", "43.3"]
    assert rows[4] == ["Transfer", "-", "30.0", "23.0", "26.5"]
    assert rows[6] == ["Last", "65.0", "84.0", "95.0", "81.3"]
    heading, *_, ours = summary_rows(results)
    cells = dict(zip(heading, ours, strict=True))
    assert cells["Last"] == "82.33 ±1.66"  # (244 + 1, 3, 5) / 3, whose standard error is 2/3 / sqrt(3); t(2) is 4.303
    assert cells["trainable"] == "1,234" and cells["minutes"] == "1.5"
    console = Console(record=True, width=200)
    print_results(results, console)
    text = console.export_text()
    assert "moe_lora_merge" in text and "<cars> & $x$" in text and "seed 0" not in text, "no matrix a seed"


def test_differences_and_equivalence(results):
    heading, zero_shot, ours = difference_rows(results)
    cells = dict(zip(heading, ours, strict=True))
    assert cells["difference to moe_adapters"] == "moe_lora_merge" and cells["seeds"] == "3"
    # a seed's shift, of which a third reaches Last: 2s + 1 against s
    assert cells["Last"] == "+0.67 [-0.16,+1.49]" and cells["Transfer"] == "+0.00 [+0.00,+0.00]"
    assert dict(zip(heading, zero_shot, strict=True))["Last"] == "-0.33 [-1.16,+0.49]"
    heading, _, ours = equivalence_rows(results, 2.0)
    cells = dict(zip(heading, ours, strict=True))
    assert heading[0] == "moe_adapters within ±2" and cells["Transfer"] == "equal, p<0.001"
    assert cells["Last"] == "equal, p=0.010"  # t = (2 - 2/3) / 0.19245, 2 degrees
    assert equivalence_rows(results, 0.7)[2][4].startswith("not shown, p=0.4")
    assert difference_rows(results, baseline="icarl") == equivalence_rows(results, 1.0, "icarl") == []
    console = Console(record=True, width=200)
    print_results(results, console, margin=2.0)
    text = console.export_text()
    assert "equal, p=0.010" in text and "two one-sided t tests" in text
    one = results | {"methods": {name: runs[:1] for name, runs in results["methods"].items()}}
    assert difference_rows(one)[2][4] == "+0.33" and equivalence_rows(one, 2.0)[2][4] == "-", "one seed shows nothing"


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
    with pytest.raises(ValueError, match="lacks tasks, methods"):
        read_results(path)
    path.write_text("no json")
    with pytest.raises(ValueError, match="is not JSON"):
        read_results(path)


def test_the_page_stands_alone(results, tmp_path):
    *pictures, page = write_report(results, tmp_path)
    html = page.read_text()
    assert html.count("data:image/png;base64,") == len(pictures) == 9
    loads = re.compile(r"""(src|href)\s*=\s*["']?(?!["']?(?:data:|#))|url\(|@import|<script""")
    assert not loads.search(html) and loads.search("<img src='//host/a.png'>") and loads.search('<a href="b.css">')
    assert "&lt;cars&gt; &amp; $x$" in html and "<cars>" not in html
    assert "Student&#39;s 95 % over seeds" in html, "the rule is named"
    for number in ("82.33", "26.5", "moe_adapters", "1,234"):
        assert number in html


def test_changes_stand_in_heat_maps(results):
    first, second = change_maps(results)
    assert (first.title, first.open, second.title, second.open) == ("moe_lora_merge", True, "moe_adapters", False)
    gains, losses = first.parts
    # the shifts 1, 3 and 5 over zero-shot's run with the same seed, in the mean; it trains nothing else here
    texts = [[cell.text for cell in cells] for _, cells in gains.lines]
    assert texts == [
        ["+3.0", "+0.0", "+0.0", "+1.0"],
        ["+0.0", "+3.0", "+0.0", "+1.0"],
        ["+0.0", "+0.0", "+3.0", "+1.0"],
    ]
    assert gains.lines[1][1][1].hover == "<cars> & $x$ after <cars> & $x$: 93.0 %, was 90.0 %"
    # birds were 80 + shift, and are 70, then 65; cars were 90 + shift, and are 84
    texts = [[cell.text for cell in cells] for _, cells in losses.lines]
    assert texts == [["", "", "", ""], ["-13.0", "", "", "-13.0"], ["-18.0", "-9.0", "", "-13.5"]]
    assert losses.lines[2][1][0].weight == -1.0 and losses.lines[2][1][1].weight == -0.5, (
        "the worst is the full colour"
    )
    assert gains.lines[0][1][0].weight == 0.6, "five points at least are"
    alone = results | {"methods": {"moe_adapters": results["methods"]["moe_adapters"]}}
    assert [part.title for part in change_maps(alone)[0].parts] == ["Since it was just learnt"]
    assert change_maps(results | {"methods": {"zero_shot": results["methods"]["zero_shot"]}}) == []
    html = report_page(results, [])
    assert html.index(summary(results)[0].split(":")[0]) < html.index("<table"), "words come first"


def test_results_that_lack_what_is_optional_have_a_report(results, tmp_path):
    """Results of the first release, those of other programs, and seeds that differ in what they have."""
    bare = {"seed": 3, "matrix": results["methods"]["zero_shot"][0]["matrix"]}
    least = {"suite": "mini", "tasks": TASKS, "methods": {"theirs": [bare], "moe_adapters": [bare]}}
    (tmp_path / "results.json").write_text(json.dumps(least))
    read = read_results(tmp_path / "results.json")
    assert read["methods"]["theirs"][0]["transfer"] == 26.5, "the metrics follow from the matrix"
    cells = dict(zip(*summary_rows(read)[:2], strict=True))
    assert cells["Last"] == "81.33" and cells["minutes"] == cells["trainable"] == cells["stored MB"] == "-"
    for document in (least, read):
        assert write_report(document, tmp_path)[-1].stat().st_size > 20_000
        print_results(document, Console(record=True))
    runs = results["methods"]["moe_lora_merge"]
    for key in sorted(runs[0].keys() - {"seed", "matrix"}):
        of_method = [{name: value for name, value in run.items() if name != key} for run in runs[:2]] + runs[2:]
        document = {name: value for name, value in results.items() if name not in ("settings", "versions")}
        document |= {"methods": {"moe_lora_merge": of_method}}
        assert ("merges_moe_lora_merge" in draw_all(document)) and "moe_lora_merge" in report_page(document, [])
        print_results(document, Console(record=True))


def test_every_block_lists_its_tasks_from_the_first_down(results):
    figure = draw_all(results)["usage_moe_lora_merge"][0]
    panels = [axes for axes in figure.axes if axes.get_title() in ("vision 0", "text 0")]
    assert len(panels) == 2 and all(axes.yaxis_inverted() for axes in panels)


def test_the_report_can_be_redone(results, tmp_path):
    write_results(tmp_path / "results.json", results)
    command = [sys.executable, "-m", "peft_moe_merge.mtil.report", str(tmp_path / "results.json")]
    options = ["--baseline", "zero_shot", "--margin", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "difference to zero_shot" in done.stdout and "equal, p=0.0" in done.stdout
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
    assert "<title>9 shown, 0 errors, wider false</title>" in done.stdout, done.stderr[-2000:]
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
