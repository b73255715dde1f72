"""The benchmark of the step: its contestants compute the same, and its numbers are there and come from its cells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import step_time
import torch
from conftest import randomize, tiny_batch, tiny_clip
from dispatch import add_dispatch
from peft import get_peft_model

from peft_moe_merge import MoELoraMergeConfig

SCRIPT = Path(step_time.__file__)
KEYS = {
    "step_over_floor",
    "dispatch_over_ours_32",
    "dispatch_over_ours_397",
    "e220_over_e22",
    "merge_share",
    "extra_memory_gb",
    "inference_over_clip",
}


def test_the_plain_dispatch_computes_what_ours_does():
    ours = get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=6, r=64)).eval()
    randomize(ours)
    dispatch = add_dispatch(tiny_clip(), num_experts=6).eval()
    blocks = [*ours.base_model.model.vision_model.encoder.layers, *ours.base_model.model.text_model.encoder.layers]
    with torch.no_grad():
        for block, mixture in zip(blocks, dispatch.mixtures, strict=True):
            bank, routers = block.mlp.moe_lora_experts["default"], block.mlp.moe_lora_routers["default"]
            mixture.router.copy_(routers.weight[0])
            for index, expert in enumerate(mixture.experts):
                expert[0].weight.copy_(bank.down_weight[index])
                expert[0].bias.copy_(bank.down_bias[index])
                expert[3].weight.copy_(bank.up_weight[index].T)
                expert[3].bias.copy_(bank.up_bias[index])
    batch = tiny_batch()
    expected = dispatch(**batch).logits_per_image
    torch.testing.assert_close(ours(**batch).logits_per_image, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, tiny_clip()(**batch).logits_per_image, atol=1e-2), "the experts matter"


def test_numbers_come_from_the_cells():
    def cell(**steps):
        return {name.replace("_", " "): {"step": values} for name, values in steps.items()}

    cells = {
        "32 prompts": cell(floor=[1.0, 2.0, 4.0], ours_55=[2.0, 4.0, 4.0], dispatch_55=[3.0, 8.0, 16.0]),
        "22 or 220 experts": cell(ours_22=[1.0], ours_220=[1.5]),
        "memory": {"floor": [3.0, 3.5], "ours 55": [4.0, 5.0], "dispatch 55": [9.0, 9.0]},
    }
    cells["32 prompts"]["ours 55"] |= {"count": [0.0, 0.04, 0.0], "merge": [2.0, 0.0, 400.0]}
    numbers = step_time.fixed_numbers(cells)
    assert numbers["step_over_floor"] == 2.0 and numbers["step_over_floor_spread"] == [1.5, 2.0]
    assert numbers["dispatch_over_ours_32"] == 2.0 and numbers["dispatch_over_ours_32_spread"] == [1.75, 3.0]
    assert numbers["e220_over_e22"] == 1.5 and numbers["e220_over_e22_spread"] == [1.5, 1.5]
    assert numbers["extra_memory_gb"] == 1.25
    assert numbers["merge_share"] == pytest.approx(0.01)  # of 0.02 / 2.02, 0.04 / 4 and 4 / 8
    assert "dispatch_over_ours_397" not in numbers, "a cell that has not been measured gives no number"


@pytest.mark.slow
def test_quick_run_and_resume(tmp_path):
    output = tmp_path / "step_time.json"
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(output)]

    def run(*arguments):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, json.loads(output.read_text())

    _, some = run("--cells", "inference")
    assert set(some) & KEYS == {"inference_over_clip"}
    table, result = run("--resume")
    assert result["cells"]["inference"] == some["cells"]["inference"], "what was measured is not measured again"
    for key in KEYS:
        low, high = result[f"{key}_spread"]
        assert 0 < low <= result[key] <= high and key in table
