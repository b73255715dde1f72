"""The benchmark of growth: an adapter grows by the same amount a task, and the numbers end in a file and a picture."""

import json
import subprocess
import sys
from pathlib import Path

import growth
import pytest

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path

SCRIPT = Path(growth.__file__)
LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def test_it_runs(tmp_path):
    files = ["--output", str(tmp_path / "out.json"), "--figure", str(tmp_path / "out.png")]
    command = [sys.executable, str(SCRIPT), "--quick", "--batch_size", "8", *files]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert "adapter, MB" in done.stdout
    measured = json.loads((tmp_path / "out.json").read_text())["measured"]
    clip, _ = load_clip(mini_clip_path())
    layers = [module for name, module in clip.named_modules() if name.endswith(LAYERS) and "encoder" in name]
    experts = sum(growth.EXPERTS * growth.RANK * (layer.in_features + layer.out_features) for layer in layers)
    routers = sum(growth.EXPERTS * layer.in_features for layer in layers)
    assert measured["parameters"] == [task * (experts + routers) for task in (1, 2, 3, 4)]
    assert measured["memory"] == [4 * number for number in measured["parameters"]]
    assert len(measured["add_seconds"]) == 3 and len(measured["step_ratio"]) == 4
    assert all(value > 0 for values in measured.values() for value in values)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_one_task_does_not_grow(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["growth.py", "--tasks", "1"])
    with pytest.raises(SystemExit):
        growth.main()
    assert "--tasks is to be at least 2, got 1" in capsys.readouterr().err
