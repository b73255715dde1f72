"""WEMoE over tasks' orthogonal parts."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from wemoe_clip import TASKS, base, features, finetuned, images, small_clip, stir_routers

from peft_moe_merge.model_merging.static import merge_static
from peft_moe_merge.tuners.wemoe import WEMoEConfig, merge_finetuned


@torch.no_grad()
def test_before_it_adapts_it_is_tsv_merge(base, finetuned, images):
    expected = features(merge_static(base, finetuned, "tsv"), images)
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig.tsv(router_depth=0)).eval()
    torch.testing.assert_close(features(model, images), expected, rtol=0, atol=1e-10)
    assert model.peft_config["default"].rank == 32 // len(TASKS)
    torch.testing.assert_close(
        features(merge_static(base, finetuned, "task_arithmetic", without_interference=True, scaling=1.0), images),
        expected,
    )


@torch.no_grad()
def test_a_gate_weighs_its_tasks_part_alone(base, finetuned, images):
    """The gates of all blocks at a task's corner: the MLPs have that task's part, which is orthogonal to the others'."""
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig.tsv(router_depth=0)).eval()
    layer = model.base_model.model.vision_model.encoder.layers[0].mlp.base_layer.fc1
    parts_TOI = layer.wemoe_up["default"].mT @ layer.wemoe_down["default"]
    for one in range(len(TASKS)):
        for other in range(one):
            assert (parts_TOI[one] @ parts_TOI[other].T).abs().max() < 1e-10
            assert (parts_TOI[one].T @ parts_TOI[other]).abs().max() < 1e-10
    merged = merge_static(base, finetuned, "tsv").vision_model.encoder.layers[0].mlp.fc1.weight
    change_OI = merged - base.vision_model.encoder.layers[0].mlp.fc1.weight
    torch.testing.assert_close(parts_TOI.sum(0), change_OI, rtol=0, atol=1e-10)


@torch.no_grad()
def test_it_is_saved_and_loaded(base, finetuned, images, tmp_path):
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig.tsv()).eval()
    stir_routers(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small_clip().double(), tmp_path).eval()
    assert again.peft_config["default"].without_interference
    torch.testing.assert_close(features(again, images), features(model, images), rtol=0, atol=0)


@torch.no_grad()
def test_loras_are_made_orthogonal_too(base, images):
    loras = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=False)
        loras[task] = get_peft_model(copy.deepcopy(base), config)
    whole = {task: copy.deepcopy(lora).merge_and_unload() for task, lora in loras.items()}
    expected = features(merge_static(base, whole, "tsv"), images)
    model = merge_finetuned(copy.deepcopy(base), loras, WEMoEConfig.tsv(router_depth=0)).eval()
    torch.testing.assert_close(features(model, images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"sparsity": 0.9}, {"gates": "projection"}])
def test_what_contradicts_it_is_refused(wrong):
    with pytest.raises(ValueError, match="without_interference=True keeps task vectors by their rank"):
        WEMoEConfig.tsv(**wrong)
