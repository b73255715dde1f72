"""WEMoE beside PEFT's conventions: saving, loading, several adapters, precision, compiling; and what may be merged."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModel
from wemoe_clip import TASKS, base, features, finetune, finetuned, images, small_clip, stir_routers

from peft_moe_merge.tuners.wemoe import WEMoEConfig, merge_finetuned
from peft_moe_merge.tuners.wemoe.router import Router


@pytest.mark.parametrize(
    "options",
    [{}, {"rank": 4}, {"sparsity": 0.9}, {"shared_router": True}, {"router_depth": 0}, {"gates": "projection"}],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_gives_the_same_model(base, finetuned, images, options, low_cpu_mem_usage, tmp_path):
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(**options))
    stir_routers(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(".wemoe_" in name for name in saved)  # no copy of the base model's weights
    assert json.loads((tmp_path / "adapter_config.json").read_text())["tasks"] == list(TASKS)
    if options.get("shared_router"):
        assert sum(name.endswith("wemoe_router.bias") for name in saved) == 1

    fresh = copy.deepcopy(base)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    with torch.no_grad():
        assert torch.equal(features(loaded, images), features(model, images))
    assert loaded.peft_config["default"].peft_type == "WEMOE"
    assert loaded.get_nb_trainable_parameters()[0] == 0
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()


def test_loads_in_a_fresh_process_that_only_imports_the_package(base, finetuned, images, tmp_path):
    base = base.float()
    model = merge_finetuned(copy.deepcopy(base), {t: m.float() for t, m in finetuned.items()}, WEMoEConfig(rank=4))
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        save_file({"images": images.float(), "features": features(model, images.float())}, tmp_path / "io.safetensors")
    program = """
import sys, torch, peft_moe_merge.tuners.wemoe
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel
folder = sys.argv[1]
io = load_file(folder + "/io.safetensors")
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder + "/base"), folder + "/adapter")
with torch.no_grad():
    torch.testing.assert_close(model.get_image_features(pixel_values=io["images"]).pooler_output, io["features"])
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)


def test_disable_and_unload_give_the_base_model_back(base, finetuned, images):
    with torch.no_grad():
        expected = features(base, images)
        state = copy.deepcopy(base.state_dict())
        model = merge_finetuned(base, finetuned, WEMoEConfig())
        merged = features(model, images)
        with model.disable_adapter():
            assert torch.equal(features(model, images), expected)
        assert torch.equal(features(model, images), merged) and not torch.equal(merged, expected)
        unloaded = model.unload()
        assert torch.equal(features(unloaded, images), expected)
    assert type(unloaded) is CLIPModel and unloaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unloaded.state_dict().items())


def test_several_adapters_side_by_side(base, finetuned, images, tmp_path):
    two = {task: finetuned[task] for task in TASKS[:2]}
    alone = {}
    for name, (own, options) in {
        "a": (finetuned, {}),
        "b": (two, {"rank": 4}),
        "c": (two, {"shared_router": True}),
    }.items():
        model = merge_finetuned(copy.deepcopy(base), own, WEMoEConfig(**options), adapter_name=name)
        stir_routers(model)
        model.save_pretrained(tmp_path)
        alone[name] = features(model, images).detach()
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.load_adapter(tmp_path / "c", "c", is_trainable=True)
    with torch.no_grad():
        for name in ("c", "a", "b"):
            model.set_adapter(name)
            assert torch.equal(features(model, images), alone[name])
    model.delete_adapter("a")
    model.set_adapter("c")
    with torch.no_grad():
        assert torch.equal(features(model, images), alone["c"])
    with pytest.raises(ValueError, match="one adapter at a time"):
        model.base_model.set_adapter(["b", "c"])
    model.save_pretrained(tmp_path / "again", selected_adapters=["c"])
    assert (tmp_path / "again" / "c" / "adapter_model.safetensors").exists()


def test_merging_into_the_base_is_refused_before_anything_changes(base, finetuned, images):
    model = merge_finetuned(base, finetuned, WEMoEConfig())
    before = features(model, images)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match="other weights for every image"):
            merge()
    assert torch.equal(features(model, images), before)


@pytest.mark.parametrize("options", [{}, {"rank": 4}, {"sparsity": 0.5}, {"gates": "projection"}])
def test_half_precision_and_autocast_keep_routers_precise(finetuned, base, images, options):
    reference = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(**options))
    expected = features(reference, images)
    half = copy.deepcopy(base).bfloat16()
    model = merge_finetuned(
        half, {t: copy.deepcopy(m).bfloat16() for t, m in finetuned.items()}, WEMoEConfig(**options)
    )
    tensors = model.base_model.state_dict()
    assert all(t.dtype == torch.float32 for n, t in tensors.items() if ".wemoe_router." in n)
    assert {t.dtype for n, t in tensors.items() if ".wemoe_delta." in n or ".wemoe_up." in n} == {torch.bfloat16}
    actual = features(model, images.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).norm() < 0.1 * expected.norm()

    single = merge_finetuned(
        copy.deepcopy(base).float(), {t: m.float() for t, m in finetuned.items()}, WEMoEConfig(**options)
    )
    seen = []
    for module in single.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        actual = features(single, images.float())
    assert set(seen) <= {torch.float32}
    assert (actual.double() - expected).norm() < 0.1 * expected.norm()
    actual.float().sum().backward() if options.get("gates") != "projection" else None


def test_works_with_gradient_checkpointing(base, finetuned, images):
    model = merge_finetuned(base, finetuned, WEMoEConfig())
    stir_routers(model)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.train()
            model.base_model.model.gradient_checkpointing_enable()
        features(model, images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=1e-10)


def test_compiles_a_block_without_graph_breaks(base, finetuned):
    model = merge_finetuned(base, finetuned, WEMoEConfig())
    block = model.base_model.model.vision_model.encoder.layers[0].mlp
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


def test_any_transformers_model_with_mlp_blocks():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    base = LlamaModel(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    tuned = finetune(base, 1, part="")
    model = merge_finetuned(
        copy.deepcopy(base), {"a": tuned}, WEMoEConfig(target_modules=["mlp"], scaling=1.0, router_depth=0)
    )
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(model(ids).last_hidden_state, tuned(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("MTIL_REAL_CLIP" not in os.environ, reason="MTIL_REAL_DIR and MTIL_REAL_CLIP are not set")
def test_a_pretrained_clip_on_photographs(tmp_path):
    folder = os.environ["MTIL_REAL_CLIP"]
    base, processor = CLIPModel.from_pretrained(folder).eval(), CLIPImageProcessor.from_pretrained(folder)
    paths = [
        next(Path(os.environ["MTIL_REAL_DIR"], task, "test").glob(f"*/*{suffix}"))
        for task, suffix in (("caltech101", ".jpg"), ("flowers102", ".jpg"), ("cifar100", ".png"), ("mnist", ".png"))
    ]
    images = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")["pixel_values"]
    tuned = {task: finetune(base, seed, size=0.005) for seed, task in enumerate(TASKS)}
    for options in ({}, {"rank": 16}, {"sparsity": 0.9, "shared_router": True}, {"gates": "projection"}):
        model = merge_finetuned(copy.deepcopy(base), tuned, WEMoEConfig(**options))
        stir_routers(model)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        with torch.no_grad():
            together = features(model, images)
            alone = torch.cat([features(loaded, image[None]) for image in images])
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
        assert torch.corrcoef(together)[0, 1:].max() < 0.99


# --- what may be merged, and what may not ---------------------------------------------------------------------------


def test_fine_tuned_models_in_every_form(base, images, tmp_path):
    base = base.float()
    cars = finetune(base, 1)
    vision_only = CLIPVisionModel(base.config.vision_config)
    vision_only.load_state_dict(
        {n.removeprefix("vision_model."): p for n, p in cars.state_dict().items() if "vision_model" in n}
    )
    cars.save_pretrained(tmp_path / "cars")
    vision_only.save_pretrained(tmp_path / "vision")
    forms = [cars, str(tmp_path / "cars"), tmp_path / "cars", cars.state_dict(), vision_only, tmp_path / "vision"]
    expected = None
    for form in forms:
        model = merge_finetuned(copy.deepcopy(base), {"cars": form}, WEMoEConfig(router_depth=0))
        with torch.no_grad():
            actual = features(model, images.float())
        expected = actual if expected is None else expected
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_lora_adapters_of_the_same_base_in_memory_and_on_disk(base, images, tmp_path):
    base = base.float()
    torch.manual_seed(0)
    lora = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, target_modules=r".*vision_model.*(fc1|fc2|q_proj)", init_lora_weights=False),
    )
    lora.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = features(lora, images.float())
    for form in (lora, tmp_path):
        model = merge_finetuned(
            copy.deepcopy(base), [("cars", form)], WEMoEConfig(router_depth=0, scaling=1.0, rank=2)
        )
        with torch.no_grad():
            torch.testing.assert_close(features(model, images.float()), expected, rtol=1e-4, atol=1e-5)
    assert "lora" in type(lora.base_model).__name__.lower()  # the adapter given is still one


def with_nan(model):
    model = copy.deepcopy(model)
    model.vision_model.post_layernorm.weight.data[0] = float("nan")
    return model


BAD = {
    "no models": (lambda base, a: {}, ValueError, "no fine-tuned model"),
    "a name twice": (lambda base, a: [("a", a), ("a", a)], ValueError, r"\['a'\] occur more than once"),
    "equal to the base": (lambda base, a: {"a": copy.deepcopy(base)}, ValueError, "'a' is equal to the base"),
    "nan": (lambda base, a: {"a": with_nan(a)}, ValueError, r"'a' has NaN.*vision_model.post_layernorm.weight"),
    "halves": (
        lambda base, a: {"a": copy.deepcopy(a).half(), "b": copy.deepcopy(a).bfloat16()},
        ValueError,
        "a: torch.float16; b: torch.bfloat16",
    ),
    "another width": (
        lambda base, a: {"a": small_clip(intermediate_size=48)},
        ValueError,
        r"encoder.layers.0.mlp.fc1.weight: \(48, 32\), in the base model \(64, 32\)",
    ),
    "another depth": (
        lambda base, a: {"a": small_clip(num_hidden_layers=1)},
        ValueError,
        "encoder.layers.1.mlp.fc1.weight: not in the fine-tuned model",
    ),
    "another architecture": (lambda base, a: {"a": nn.Linear(2, 2)}, ValueError, "no tensor has a name"),
    "not a model": (lambda base, a: {"a": 3}, TypeError, "'a' is a int"),
    "no such folder": (lambda base, a: {"a": "./nowhere/at/all"}, OSError, "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_models_are_named_and_leave_the_base_alone(base, case, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make, error, message = BAD[case]
    base = base.float()
    modules = [type(module) for module in base.modules()]
    finetuned = make(base, finetune(base, 1))
    with pytest.raises(error, match=message):
        merge_finetuned(base, finetuned, WEMoEConfig())
    assert [type(module) for module in base.modules()] == modules


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "magic"}, "gates='magic'"),
        ({"router_depth": 3}, "router_depth=3"),
        ({"rank": 0}, "rank=0"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"rank": 4, "sparsity": 0.5}, "two ways"),
        ({"gates": "projection", "rank": 4, "gate_rank": 8}, "gate_rank=8"),
        ({"tasks": ["a", "a"]}, "more than once"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        WEMoEConfig(**options)


def test_targets_of_the_wrong_kind_are_named_and_leave_the_base_alone(base, finetuned):
    modules = [type(module) for module in base.modules()]
    for options, message in (
        ({"target_modules": ["mlp", "fc1"]}, "'.*fc1' is Linear"),
        ({"target_modules": r".*vision_model\.encoder\.layers\.1"}, "CLIPEncoderLayer with the other parameters"),
        ({"target_modules": ["mlp"], "gates": "projection"}, "is CLIPMLP"),
    ):
        with pytest.raises(TypeError, match=message):
            merge_finetuned(base, finetuned, WEMoEConfig(**options))
        assert [type(module) for module in base.modules()] == modules
    with pytest.raises(ValueError, match="'feed_forward'} matches no module of CLIPModel"):
        merge_finetuned(base, finetuned, WEMoEConfig(target_modules=["feed_forward"]))
    assert [type(module) for module in base.modules()] == modules
    with pytest.raises(ValueError, match="tasks is empty"):
        get_peft_model(base, WEMoEConfig())
    with pytest.raises(ValueError, match="has adapters in it"):
        merge_finetuned(get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])), finetuned)


def test_different_precisions_are_said(base):
    with pytest.warns(UserWarning, match="the base model: torch.float32; a: torch.bfloat16"):
        merge_finetuned(base.float(), {"a": finetune(base, 1).bfloat16()}, WEMoEConfig())


def test_what_cannot_be_merged_is_said(base):
    tuned = finetune(base, 1)
    tuned.logit_scale.data += 1.0
    with pytest.warns(UserWarning, match="logit_scale"):
        merge_finetuned(base, {"a": tuned}, WEMoEConfig())


def test_an_adapter_for_another_width_does_not_load(base, finetuned, tmp_path):
    merge_finetuned(base, finetuned, WEMoEConfig()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors': These weights do not fit.*another base model"):
        PeftModel.from_pretrained(small_clip(hidden_size=16), tmp_path)
