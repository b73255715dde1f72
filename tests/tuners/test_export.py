"""A task of the pool as an ordinary LoRA, which needs this package no more."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_moe_merge import MoELoraMergeConfig

ONE = {"experts_per_task": 1, "top_k": 1, "r": 2}
PLAIN_PEFT = """
import sys
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

base, adapter, batch, outputs = sys.argv[1:]
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), adapter).eval()
batch = load_file(batch)
outs = {"adapted": model(**batch).logits_per_image.detach().contiguous()}
outs["merged"] = model.merge_and_unload()(**batch).logits_per_image.detach().contiguous()
save_file(outs, outputs)
assert not [name for name in sys.modules if name.startswith("peft_moe_merge")]
"""


def pool(tasks=("a", "b"), base=None, **fields):
    torch.manual_seed(0)
    config = MoELoraMergeConfig.pool(tasks=list(tasks), **{**ONE, **fields})
    model = get_peft_model(tiny_clip() if base is None else base, config)
    randomize(model)
    return model.eval()


def logits(model, task=None, **more):
    if task is not None:
        model.set_task(task)
    with torch.no_grad():
        return model.eval()(**tiny_batch(), **more).logits_per_image


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True, "r": 3, "lora_alpha": 5.0}, {"routing": "token"}])
def test_the_lora_gives_what_the_task_gave(fields):
    model = pool(**fields)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(tiny_clip())
    for task in ("a", "b"):
        exported, expected = model.export_lora(task), logits(model, task)
        assert (expected - plain).abs().max() > 1e-2
        assert exported.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(logits(exported), expected, rtol=1e-5, atol=1e-5)
        merged = exported.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    # it is a copy: nothing of the model has moved with it
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_peft_alone_loads_and_merges_it(tmp_path):
    model = pool()
    model.add_task("c")
    randomize(model, seed=4)
    tiny_clip().save_pretrained(tmp_path / "base")
    model.export_lora("c").save_pretrained(tmp_path / "lora")
    save_file(tiny_batch(), tmp_path / "batch.safetensors")
    script = tmp_path / "plain_peft.py"
    script.write_text(PLAIN_PEFT)
    files = [str(tmp_path / name) for name in ("base", "lora", "batch.safetensors", "outputs.safetensors")]
    command = [sys.executable, str(script), *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    outputs, expected = load_file(Path(files[-1])), logits(model, "c")
    for name in ("adapted", "merged"):
        torch.testing.assert_close(outputs[name], expected, rtol=1e-5, atol=1e-5)


def test_it_trains_on_as_a_lora(tmp_path):
    model = pool()
    model.export_lora("b").save_pretrained(tmp_path)
    lora = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True)
    lora(**tiny_batch()).logits_per_image.sum().backward()
    counted = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert counted and all(
        parameter.grad is not None for name, parameter in lora.named_parameters() if name in counted
    )
    # as many numbers as the task's own experts hold
    own = sum(
        parameter.numel()
        for block, (expert,) in model.experts_of_task("b").items()
        for parameter in model.expert_banks()[block].parameters_of(expert)
    )
    assert sum(parameter.numel() for name, parameter in lora.named_parameters() if name in counted) == own


def test_experts_merged_into_one_are_a_lora():
    model = pool(experts_per_task=2, top_k=2)
    with pytest.raises(ValueError, match="2 experts"):
        model.export_lora("a")
    model.set_task("a")
    model.train()(**tiny_batch())
    model.merge_experts()
    torch.testing.assert_close(logits(model.export_lora("a")), logits(model, "a"), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 experts"):
        model.export_lora("b")


def test_a_task_that_lives_on_a_shared_union_is_a_lora():
    model = pool(max_experts=2)
    model.add_task("c")  # a and b become one
    assert model.experts_of_task("a") == model.experts_of_task("b")
    for task in ("a", "b", "c"):
        torch.testing.assert_close(logits(model.export_lora(task)), logits(model, task), rtol=1e-5, atol=1e-5)


def test_modules_saved_whole_come_along():
    model = pool(modules_to_save=["visual_projection"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(-2)
    exported = model.export_lora("a")
    torch.testing.assert_close(logits(exported), logits(model, "a"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(exported.merge_and_unload()), logits(model, "a"), rtol=1e-5, atol=1e-5)


def test_a_base_in_half_precision_keeps_its_experts_whole():
    model = pool(base=tiny_clip().to(torch.bfloat16))
    exported = model.export_lora("a")
    lora = [parameter for name, parameter in exported.named_parameters() if "lora_" in name]
    assert {parameter.dtype for parameter in lora} == {torch.float32}
    for block, (expert,) in model.experts_of_task("a").items():
        layer, tensors = exported.base_model.model.get_submodule(block), model.expert_parameters(block, expert)
        assert torch.equal(layer.lora_A["default"].weight.T, tensors["down_weight"])
        assert torch.equal(layer.lora_B["default"].weight.T, tensors["up_weight"])


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"expert_activation": "relu", "merge_strategy": "average"}, "expert_activation='relu'.*bake_task"),
        ({"experts_per_task": 2}, "2 experts.*experts_per_task=1, top_k=1"),
        ({"experts_per_task": 2, "top_k": 2}, "2 experts.*experts_per_task=1, top_k=1"),
        ({"target_modules": ["mlp"]}, "a whole MLP block.*linear layers in `target_modules`"),
    ],
)
def test_what_is_no_lora_is_refused_with_the_reason(fields, reason):
    model = pool(**fields)
    with pytest.raises(ValueError, match=f"'a' is no LoRA.*{reason}"):
        model.export_lora("a")
    # the advice: a slim model of any task
    torch.testing.assert_close(logits(model.bake_task("a"), "a"), logits(model, "a"), rtol=1e-5, atol=1e-5)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="Unknown task 'z'"):
        pool().export_lora("z")
