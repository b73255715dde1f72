"""The study of all methods: what it keeps of its runs, and the tables it makes of that."""

import subprocess
import sys
from pathlib import Path

import pytest
import whole_table
from PIL import Image

from peft_moe_merge.mtil.results import empty_results, read_results, write_results

SCRIPT = Path(whole_table.__file__)


def told(seed, methods, tasks=("a", "b")):
    def run(last):
        return {"seed": seed, "matrix": [[50.0, 20.0], [last, last]], "losses": [[1.0]], "stored_bytes": 2_000_000}

    return {"suite": "/somewhere/photos", "tasks": list(tasks), "methods": {m: [run(v)] for m, v in methods.items()}}


def test_studies_add_up_in_what_is_kept(tmp_path):
    for seed, ours in ((100, 60.0), (101, 62.0), (102, 61.0)):
        whole_table.keep(told(seed, {"moe_lora_pool": ours, "lora_per_task": ours + 0.5}), tmp_path, seed)
    before = (tmp_path / "seed_100.json.gz").read_bytes()
    for seed in (100, 101):
        whole_table.keep(told(seed, {"zero_shot": 30.0}), tmp_path, seed)
    runs = whole_table.kept_runs(tmp_path)
    assert {method: [run["seed"] for run in known] for method, known in runs.items()} == {
        "moe_lora_pool": [100, 101, 102],
        "lora_per_task": [100, 101, 102],
        "zero_shot": [100, 101],
    }
    assert runs["moe_lora_pool"][1]["last"] == 62.0 and "losses" not in runs["moe_lora_pool"][1]
    assert read_results(tmp_path / "seed_100.json.gz")["suite"] == "photos", "a folder's place is nobody's business"
    whole_table.keep(told(100, {"moe_lora_pool": 60.0, "lora_per_task": 60.5}), tmp_path / "again", 100)
    assert (tmp_path / "again" / "seed_100.json.gz").read_bytes() == before, "the same runs give the same bytes"
    with pytest.raises(
        SystemExit, match=r"is of the tasks \['a', 'b'\], not \['a', 'c'\]: keep them in another folder"
    ):
        whole_table.keep(told(100, {"zero_shot": 30.0}, ("a", "c")), tmp_path, 100)

    command = [sys.executable, str(SCRIPT), "--only_show", "--markdown", "--keep", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "| moe_lora_pool | 3 |" in printed and "| zero_shot | 2 |" in printed
    assert "| lora_per_task | " in printed and "-0.50" in printed and "| yes | 0.0000 |" in printed
    command += ["--seeds", "101", "102"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "| moe_lora_pool | 2 |" in printed and "| zero_shot | 1 |" in printed


def test_runs_of_another_study_are_kept_and_drawn(tmp_path):
    run = told(100, {"rail": 40.0})
    run["methods"]["rail"][0]["x_tail"] = [
        {"selector": None, "decision": None, "transfer": 7.25, "average": 8.5, "last": 9.75}
    ]
    other = tmp_path / "other" / "seed_100" / "results.json"
    other.parent.mkdir(parents=True)
    write_results(other, empty_results("photos", ["a", "b"], {}) | {"methods": run["methods"]})
    whole_table.keep(told(100, {"zero_shot": 30.0}), tmp_path / "kept", 100)
    command = [sys.executable, str(SCRIPT), "--only_show", "--markdown", "--keep", str(tmp_path / "kept")]
    command += ["--add", str(tmp_path / "other"), "--figure", str(tmp_path / "picture.png")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert "| rail | nobody | all classes | 7.25 | 8.50 | 9.75 |" in printed
    assert list(whole_table.kept_runs(tmp_path / "kept")) == ["rail", "zero_shot"]  # best first
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 500


def test_a_kept_file_that_is_damaged_is_named(tmp_path):
    whole_table.keep(told(100, {"zero_shot": 30.0}), tmp_path, 100)
    file = tmp_path / "seed_100.json.gz"
    content = file.read_bytes()
    for damaged in (content[:-9], b"not compressed", content[:4] + b"\x00" * 20):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"seed_100.json.gz' is not JSON"):
            read_results(file)
    with pytest.raises(SystemExit, match="There is no seed_"):
        whole_table.kept_runs(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=r"of the seeds \[7\]"):
        whole_table.kept_runs(tmp_path, [7])
