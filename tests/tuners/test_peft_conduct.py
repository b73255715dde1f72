"""It behaves as PEFT's own methods do."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip, without_checksums
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_moe_merge import MoELoraMergeConfig

BLOCK = "vision_model.encoder.layers.0.mlp"


def config(**kwargs):
    return MoELoraMergeConfig(**{"num_experts": 6, "r": 4, "tasks": ["a", "b"], **kwargs})


def trained(seed=1, base=None, **kwargs):
    """An adapter with everything in it: weights, counts, frozen experts, a task that is not the first."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip() if base is None else base, config(**kwargs))
    randomize(model, seed)
    model.set_task("b")
    model.train()
    model(**tiny_batch())
    model.freeze_experts(2)
    return model.eval()


def logits(model, **kwargs):
    with torch.no_grad():
        return model(**tiny_batch(), **kwargs).logits_per_image


def same_state(first, second):
    return (
        first.frozen_experts() == second.frozen_experts()
        and all(torch.equal(second.expert_usage()[block], counts) for block, counts in first.expert_usage().items())
        and first.peft_config["default"].tasks == second.peft_config["default"].tasks
    )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_save_and_load(tmp_path, low_cpu_mem_usage, is_trainable):
    model = trained()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(
        tiny_clip(), tmp_path, is_trainable=is_trainable, low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert torch.equal(logits(loaded), logits(model)) and same_state(model, loaded)
    assert loaded.peft_config["default"].current_task == "b"
    if not is_trainable:
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        return
    original = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == original
    for block, frozen in loaded.frozen_experts().items():
        bank = loaded.expert_banks()[block]
        assert [e for e in range(6) if not bank.down_weight[e].requires_grad] == frozen and len(frozen) >= 2


def test_same_logits_in_a_fresh_process(tmp_path):
    model = trained()
    tiny_clip().save_pretrained(tmp_path / "clip")
    model.save_pretrained(tmp_path / "adapter")
    save_file({**tiny_batch(), "logits": logits(model).contiguous()}, tmp_path / "batch.safetensors")
    code = """
import sys, torch, peft_moe_merge
from peft import PeftModel, PeftConfig
from safetensors.torch import load_file
from transformers import CLIPModel
folder = sys.argv[1]
batch = load_file(folder + "/batch.safetensors")
expected = batch.pop("logits")
assert type(PeftConfig.from_pretrained(folder + "/adapter")).__name__ == "MoELoraMergeConfig"
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder + "/clip"), folder + "/adapter")
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits_per_image, expected, rtol=1e-6, atol=1e-6)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_auto_class(tmp_path):
    from peft import AutoPeftModel

    clip = tiny_clip()
    clip.save_pretrained(tmp_path / "clip")
    model = trained(base=type(clip).from_pretrained(tmp_path / "clip"))
    model.save_pretrained(tmp_path / "adapter")
    assert PeftConfig.from_pretrained(tmp_path / "adapter").base_model_name_or_path == str(tmp_path / "clip")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)


def test_state_dict_keys_do_not_name_the_adapter(tmp_path):
    names = ["lora", "moe", "moe_lora", "moe_lora_experts_x"]  # names within one another, and within our own
    model = get_peft_model(tiny_clip(), config(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config())
    for seed, name in enumerate(names):
        model.set_adapter(name)
        bank = model.expert_banks()[BLOCK]
        with torch.no_grad():
            bank.up_weight[0].fill_(seed + 1.0)
    reference = get_peft_model_state_dict(get_peft_model(tiny_clip(), config()))
    for seed, name in enumerate(names):
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert state.keys() == reference.keys()
        assert not any(f".{other}." in key for key in state for other in names)
        assert (state[f"base_model.model.{BLOCK}.moe_lora_experts.up_weight.0"] == seed + 1.0).all()
        model.save_pretrained(tmp_path, selected_adapters=[name])
        again = get_peft_model(tiny_clip(), config())
        again.load_adapter(tmp_path / name, "other")
        again.set_adapter("other")
        assert (again.expert_parameters(BLOCK, 0)["up_weight"] == seed + 1.0).all()


def test_state_dict_round_trip():
    model, other = trained(), get_peft_model(tiny_clip(), config()).eval()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert not result.unexpected_keys
    other.set_task("b")
    assert torch.equal(logits(other), logits(model)) and same_state(model, other)


def test_several_adapters(tmp_path):
    model = trained(seed=1)
    first = logits(model)
    second_alone = trained(seed=2)
    second_alone.save_pretrained(tmp_path)
    grad_before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.load_adapter(tmp_path, "second")
    assert torch.equal(logits(model), first), "loading does not activate"
    now = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: now[name] for name in grad_before} == grad_before
    assert not any(value for name, value in now.items() if ".second." in name)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(second_alone))
    assert model.frozen_experts() == second_alone.frozen_experts()
    model.set_task("a")
    model.set_adapter("default")
    assert torch.equal(logits(model), first), "the other adapter keeps its own task"
    assert torch.equal(logits(model, task_ids=torch.ones(4, dtype=torch.long)), first)
    model.delete_adapter("default")
    assert list(model.peft_config) == ["second"] and model.active_adapters == ["second"]
    second_alone.set_task("a")
    assert torch.equal(logits(model), logits(second_alone))
    assert not any(".default." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("is_trainable", [False, True])
def test_disabling_gives_the_base_model_and_restores_everything(tmp_path, is_trainable):
    trained().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=is_trainable).eval()
    before, grads = logits(model), [parameter.requires_grad for parameter in model.parameters()]
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_clip()))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.get_model_status().enabled is False
    assert torch.equal(logits(model), before) and not model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    model.train()
    model(**tiny_batch())
    assert [parameter.requires_grad for parameter in model.parameters()] == grads, "a forward pass unfreezes nothing"


def test_unload_gives_the_base_model_back():
    base = tiny_clip()
    model = trained(base=base)
    model.gradient_checkpointing_enable()
    model.train()
    model(**tiny_batch())
    unloaded = model.unload().eval()
    unloaded.gradient_checkpointing_disable()
    assert unloaded is base and type(base.vision_model.encoder.layers[0].mlp).__name__ == "CLIPMLP"
    assert torch.equal(logits(base), logits(tiny_clip()))
    hooks = [hook for m in base.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any(hook.__module__.startswith("peft_moe_merge") for hook in hooks)
    again = get_peft_model(base, config())
    assert torch.equal(logits(again.eval()), logits(tiny_clip()))


@pytest.mark.parametrize("act", ["merge_and_unload", "merge_adapter"])
def test_merging_into_the_base_is_refused(act):
    model = trained()
    before = logits(model)
    with pytest.raises(ValueError, match=r"depends on the input.*bake_task.*unload"):
        getattr(model, act)()
    assert torch.equal(logits(model), before)


def test_bake_task(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), config(num_experts=20, modules_to_save=["visual_projection"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for task in "ab":
        model.set_task(task)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            model(**tiny_batch(seed=step)).logits_per_image.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with pytest.raises(ValueError, match="Unknown task 'z'"):
        model.bake_task("z")
    for task in "ab":
        model.set_task(task)
        baked = model.bake_task(task)
        torch.testing.assert_close(logits(baked), logits(model), rtol=1e-5, atol=1e-5)
        assert baked.peft_config["default"].tasks == [task] and baked.peft_config["default"].num_experts < 20
        sizes = [sum(p.numel() for n, p in m.named_parameters() if "moe_lora" in n) for m in (baked, model)]
        assert sizes[0] < 0.95 * sizes[1]
        assert not any(parameter.requires_grad for parameter in baked.parameters())
        baked.save_pretrained(tmp_path / task)
        loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path / task)
        assert torch.equal(logits(loaded), logits(baked))
    # images unlike those of training too: what was dropped can't be chosen by anything
    odd = {**tiny_batch(), "pixel_values": 50 * torch.randn(64, 3, 16, 16)}
    torch.testing.assert_close(baked(**odd).logits_per_image, model(**odd).logits_per_image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_base(dtype, autocast_adapter_dtype, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip().to(dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for n, p in model.named_parameters() if "moe_lora" in n} == {expected}
    randomize(model)
    batch = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tiny_batch().items()}
    output = model.train()(**batch).logits_per_image
    assert output.dtype == dtype and output.isfinite().all()
    output.float().sum().backward()
    reference = get_peft_model(tiny_clip(), config())
    randomize(reference)
    half, full = model.eval()(**batch).logits_per_image.float(), reference.eval()(**tiny_batch()).logits_per_image
    assert (half - full).abs().mean() < 0.15 * full.abs().mean()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip().to(dtype), tmp_path, autocast_adapter_dtype=autocast_adapter_dtype)
    assert torch.equal(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


def test_autocast_keeps_routing_in_float32():
    model = trained()
    decisions = []
    for routers in model.router_banks().values():
        routers.register_forward_hook(lambda module, args, output: decisions.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = logits(model)
    assert output.dtype == torch.bfloat16
    assert len(decisions) == 4 and all(gates.dtype == torch.float32 for _, gates in decisions)


def test_device_map_and_model_status(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    clip = type(tiny_clip()).from_pretrained(tmp_path / "clip", device_map="cpu")
    model = get_peft_model(clip, config(tasks=["a"]))
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOE_LORA_MERGE"} and status.adapter_model_type == "MoELoraMergeModel"
    assert status.num_adapter_layers == 4 and status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]} and status.trainable_params == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    layer = next(layer for layer in model.get_layer_status() if layer.name.endswith(BLOCK))
    assert layer.module_type == "moe_lora_merge.MLP" and layer.available_adapters == ["default"]
    assert "moe_lora_merge.MLP(" in repr(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        clip.__class__.from_pretrained(tmp_path / "clip", device_map="cpu"), tmp_path / "adapter", device_map="cpu"
    )
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


def test_modules_to_save(tmp_path):
    model = get_peft_model(tiny_clip(), config(modules_to_save=["visual_projection"]))
    with torch.no_grad():
        model.base_model.model.visual_projection.modules_to_save["default"].weight[0].mul_(3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert not torch.equal(logits(loaded), logits(tiny_clip()))


def test_init_weights():
    torch.manual_seed(0)
    assert not torch.equal(logits(get_peft_model(tiny_clip(), config(init_weights=False)).eval()), logits(tiny_clip()))
    torch.manual_seed(3)
    first = get_peft_model(tiny_clip(), config(init_weights=False))
    torch.manual_seed(3)
    tiny_clip()  # sets the seed itself; the same seed, the same experts
    second = get_peft_model(tiny_clip(), config(init_weights=False))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(how):
    model = trained()
    twin = how(model)
    assert torch.equal(logits(twin), logits(model))
    before = logits(model)
    twin.set_task("a")
    twin.merge_experts()
    assert torch.equal(logits(model), before)
    model.set_task(None)
    assert not torch.equal(logits(twin), logits(model)), "the twin's hooks are its own"


def damage(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop_one(tensors):
    del tensors[f"base_model.model.{BLOCK}.moe_lora_experts.up_weight.3"]


def cut_one(tensors):
    key = f"base_model.model.{BLOCK}.moe_lora_routers.weight.1"
    tensors[key] = tensors[key][:, :5].contiguous()


def one_too_many(tensors):
    key = f"base_model.model.{BLOCK}.moe_lora_routers.weight."
    tensors[key + "2"] = tensors[key + "1"].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_one, r"1 missing: .*layers\.0\.mlp\.moe_lora_experts\.default\.up_weight\.3"),
        (cut_one, r"1 of a wrong shape: .*weight\.1 is \(32, 5\), expected \(32, 6\)"),
        (one_too_many, r"1 unexpected: .*routers\.weight\.2"),
    ],
)
def test_damaged_file(tmp_path, change, message):
    trained().save_pretrained(tmp_path)
    without_checksums(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_file_for_another_base_model(tmp_path):
    trained().save_pretrained(tmp_path)
    from transformers import CLIPConfig, CLIPModel

    wider = tiny_clip().config.to_dict()
    wider["vision_config"]["hidden_size"] = 64
    with pytest.raises(ValueError, match=r"of a wrong shape.*another base model"):
        PeftModel.from_pretrained(CLIPModel(CLIPConfig.from_dict(wider)), tmp_path)


def test_file_that_says_something_else_than_its_config(tmp_path):
    trained().save_pretrained(tmp_path)
    without_checksums(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "num_experts": 5}))
    with pytest.raises(ValueError, match="5 experts of rank 4"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_a_refused_second_tuner_leaves_the_first_as_it_was(clip, batch):
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=["a", "b"])
    model = get_peft_model(clip, config).eval()
    randomize(model)
    model.set_task("b")
    before = model(**batch).logits_per_image
    with pytest.raises(ValueError, match="has experts already"):
        get_peft_model(clip, MoELoraMergeConfig(num_experts=3, r=2, tasks=["x"]))
    assert model.peft_config["default"].tasks == ["a", "b"]
    assert torch.equal(model(**batch).logits_per_image, before)
