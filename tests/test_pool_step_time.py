"""The benchmark of the pool's step: who is compared trains as much, and ratios are taken within rounds."""

import json
import subprocess
import sys
from pathlib import Path

import pool_step_time

SCRIPT = Path(pool_step_time.__file__)


def test_contestants_train_the_same_number_of_weights_beside_the_same_layers():
    lora = pool_step_time.Contestant("LoRA", 0)
    for name, experts in (("1 x r16", 1), ("2 x r8", 2)):
        model = pool_step_time.Contestant(name, 0).model
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        assert sum(size for n, size in trained.items() if "experts" in n) == lora.trained
        assert len([n for n in trained if ".up_weight." in n]) == experts * len(lora.model.targeted_module_names)


def test_ratios_are_taken_within_a_round():
    seconds = {"LoRA": [1.0, 2.0, 4.0], "1 x r16": [3.0, 4.0, 4.0], "2 x r8": [1.0, 1.0, 2.0]}
    seconds["2 x r8, 110 tasks"] = [2.0, 3.0, 8.0]
    ratios = pool_step_time.compare(seconds)["ratios"]
    assert ratios["1 x r16 / LoRA"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert ratios["2 x r8 / LoRA"] == {"median": 0.5, "lowest": 0.5, "highest": 1.0}
    assert ratios["2 x r8, 110 tasks / 2 x r8"] == {"median": 3.0, "lowest": 2.0, "highest": 4.0}


def test_it_runs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--quick", "--clock", "cpu", "--output", str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    results = json.loads((tmp_path / "out.json").read_text())
    for phase in ("training step", "inference"):
        assert all(row["lowest"] > 0 for row in results[phase]["milliseconds"].values())
        assert len(results[phase]["ratios"]) == 3
