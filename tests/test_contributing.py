"""The examples of docs/contributing.md do what the page says: each a file more in a copy of the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import peft_moe_merge
from peft_moe_merge.model_merging import static

PACKAGE = Path(peft_moe_merge.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "contributing.md"
EXAMPLE = Path(__file__).parents[1] / "examples" / "mtil.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a copy of the package, and the page's examples in it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(PACKAGE, folder / "peft_moe_merge", ignore=shutil.ignore_patterns("__pycache__"))
    files = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [Path(name).stem for name, _ in files] == ["bitfit", "stripes", "nearest_mean", "median"]
    for name, code in files:
        if Path(name).stem != "median" or hasattr(static, "static_merge"):
            assert not (folder / name).exists()
            (folder / name).write_text(code)
    return folder


def python(place, *arguments, expect=0):
    environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


RUN = ["--suite", "stripes", "--selectors", "nearest_mean", "--steps", "4", "--batch_size", "8", "--cpu"]
RUN += ["--methods", "bitfit", "moe_lora_merge", "--num_experts", "4", "--r", "2", "--bias_lr", "0.01"]


def test_method_and_data_set_and_selector_on_the_command_line(place):
    python(place, str(EXAMPLE), *RUN, "--output_dir", "straight")
    results = json.loads((place / "straight" / "results.json").read_text())
    assert results["tasks"] == ["direction", "width"] and results["settings"]["bias_lr"] == 0.01
    (bitfit,), (mixture,) = results["methods"]["bitfit"], results["methods"]["moe_lora_merge"]
    assert len(bitfit["moved"]) == 2 and min(bitfit["moved"]) > 0 and "moved" not in mixture
    assert bitfit["selection"] == {} and mixture["selection"]["nearest_mean"]["bytes_per_task"] == 4 * 256 + 3 * 8
    assert (place / "straight/moe_lora_merge/seed_42/after_2/selectors/nearest_mean/selector.json").exists()
    wrong = python(place, str(EXAMPLE), "--bias_lr", "-1", "--cpu", expect=1)
    assert "`bias_lr` must be positive, got -1.0" in wrong.stderr


@pytest.mark.slow
def test_its_runs_stop_and_go_on(place):
    python(place, str(EXAMPLE), *RUN, "--output_dir", "whole")
    results = json.loads((place / "whole" / "results.json").read_text())
    python(place, str(EXAMPLE), *RUN, "--output_dir", "stopped", "--stop_after", "1")
    refused = python(place, str(EXAMPLE), *RUN, "--output_dir", "stopped", "--resume", "--bias_lr", "0.02", expect=1)
    assert "bias_lr was 0.01, is 0.02" in refused.stderr
    python(place, str(EXAMPLE), *RUN, "--output_dir", "stopped", "--resume")
    resumed = json.loads((place / "stopped" / "results.json").read_text())
    for name in results["methods"]:
        one, other = (told["methods"][name][0] for told in (results, resumed))
        assert {key: value for key, value in one.items() if key != "seconds"} == {
            key: value for key, value in other.items() if key != "seconds"
        }


def test_selector_by_hand(place):
    code = """
import torch
from peft_moe_merge.selection import SELECTORS, load_selector, save_selector
selector, generator = SELECTORS["nearest_mean"](reject_rate=0.1), torch.Generator().manual_seed(0)
images = {task: 5 * position + torch.randn(200, 6, generator=generator) for position, task in enumerate("abc")}
for task, features in images.items():
    selector.fit(task, features)
save_selector(selector, "kept")
for chosen in (selector, load_selector("kept")):
    for position, features in enumerate(images.values()):
        ids = chosen.select(features)[0]
        assert set(ids.tolist()) <= {position, -1} and 0.8 < (ids == position).float().mean() < 0.98
    assert (chosen.select(torch.full((1, 6), 100.0))[0] == -1).all()
"""
    python(place, "-c", code)


@pytest.mark.skipif(not hasattr(static, "static_merge"), reason="static merges have no registry yet")
def test_merge(place):
    code = """
import copy, torch
from torch import nn
from peft_moe_merge.model_merging.static import merge_static
import peft_moe_merge.model_merging.static.median
base = nn.Linear(3, 2)
tuned = {name: copy.deepcopy(base) for name in "abc"}
for shift, model in zip((1.0, 2.0, 6.0), tuned.values()):
    model.weight.data += shift
merged = merge_static(base, tuned, "median", scaling=0.5)
torch.testing.assert_close(merged.weight, base.weight + 0.5 * 2.0)
torch.testing.assert_close(merged.bias, base.bias)
try:
    merge_static(base, tuned, "median", density=1)
except ValueError as error:
    assert "scaling" in str(error) and "density" in str(error), error
else:
    raise SystemExit("an unknown option was taken")
"""
    python(place, "-c", code)
