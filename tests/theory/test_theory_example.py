import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch

from peft_moe_merge.theory.simulate import Setting, simulate

EXAMPLE = Path(__file__).parents[2] / "examples" / "theory.py"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(EXAMPLE), "--output_dir", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theory") / "new" / "results"
    done = run(folder, "--seeds", "3", "--rounds", "110", "--ensemble", "50")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_figures_are_complete_pngs_and_nothing_is_left_over(written):
    folder, _ = written
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) == 9
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
    assert {p.name for p in folder.iterdir()} == {p.name for p in pictures} | {"index.html", "results.json"}


def test_the_page_holds_all_pictures_and_needs_no_network(written):
    folder, _ = written
    page = (folder / "index.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(list(folder.glob("*.png"))) == page.count("src=")
    assert "<script" not in page and not re.search(r"""(href|src)=["']?(?!["']?(?:data:|#))|url\(|@import""", page)
    assert "Student's 95 % over seeds" in unescape(page), "the rule is named"


def test_numbers_are_those_of_the_simulation(written):
    folder, printed = written
    results = json.loads((folder / "results.json").read_text())
    assert results["seeds"] == [0, 1, 2]
    for name, setting in (
        ("single", Setting(experts=1, stop=False, rounds=110)),
        ("stopped/10", Setting(experts=10, rounds=110)),
        ("noise/0.1", Setting(routing_noise=0.1, rounds=110)),
        ("flags/gt/5/0.01", Setting(flag_rule="gt", gap=0.01, rounds=110)),
    ):
        again = simulate(setting, range(3))
        torch.testing.assert_close(torch.tensor(results["runs"][name]["error"]).double(), again.error_ST[:, -1])
        assert ("purity" in results["runs"][name]) == (setting.experts > 1)
        assert results["runs"][name]["frozen_at"] == again.frozen_at_S.tolist()
    for claim in results["claims"]:
        assert f"{claim['name']}: {claim['verdict']}." in printed
        for criterion in claim["criteria"]:
            assert criterion["measured"] in printed


def test_bad_arguments_end_before_anything_is_written(tmp_path):
    done = run(tmp_path / "results", "--rounds", "60")
    assert done.returncode == 2
    assert "exploration takes 100 rounds" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "results").exists()

    (tmp_path / "taken").write_text("mine")
    done = run(tmp_path / "taken")
    assert done.returncode == 2 and "is a file" in done.stderr
    done = run(tmp_path / "other", "--out", str(tmp_path / "taken"))  # as it was called
    assert done.returncode == 2 and "is a file" in done.stderr and "`--out` is now `--output_dir`" in done.stderr
    assert (tmp_path / "taken").read_text() == "mine"
