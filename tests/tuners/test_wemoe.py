"""The WEMoE method against a plain loop over images, tasks and tensors written here, and PEFT's conduct around it."""

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
from torch.func import functional_call
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel
from wemoe_clip import TASKS, finetune, small_clip, stir_routers

from peft_moe_merge.tuners.wemoe import WEMoEConfig, ensembling, merge_finetuned
from peft_moe_merge.tuners.wemoe.layer import WEMoEBlock, WEMoELinear
from peft_moe_merge.tuners.wemoe.router import Router
from peft_moe_merge.tuners.wemoe.task_vectors import densify, sparsify, truncate


@pytest.fixture
def base():
    return small_clip().double()


@pytest.fixture
def finetuned(base):
    return {task: finetune(base, seed) for seed, task in enumerate(TASKS, start=1)}


@pytest.fixture
def images():
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def features(model, images):
    return model.get_image_features(pixel_values=images).pooler_output


def reference_features(base, finetuned, images, routers, scaling=0.3):
    """WEMoE as the paper writes it: one image, one task, one tensor at a time, autograd on everything.

    `routers` maps a block's name to (W1, b1, W2, b2), some of them None for shallower routers.
    """
    theta = {name: p.detach() for name, p in base.named_parameters()}
    tau = {
        task: {name: p.detach() - theta[name] for name, p in model.named_parameters()}
        for task, model in finetuned.items()
    }
    arithmetic = {name: theta[name] + scaling * sum(tau[task][name] for task in finetuned) for name in theta}
    gates, outputs = {}, []

    for image in images:
        model = copy.deepcopy(base)

        def run_block(block, h_SH, name, own_gates):
            w1, b1, w2, b2 = routers[name]
            if w1 is not None:
                r = torch.relu(h_SH @ w1.T + b1) @ w2.T + b2
            elif w2 is not None:
                r = h_SH @ w2.T + b2
            else:
                r = b2.expand(len(h_SH), -1)
            gate_T = r.mean(0)
            own_gates.append(gate_T)
            merged = {}
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                merged[part] = theta[f"{name}.{part}"]
                for position, task in enumerate(finetuned):
                    merged[part] = merged[part] + gate_T[position] * tau[task][f"{name}.{part}"]
            hidden = block.activation_fn(h_SH @ merged["fc1.weight"].T + merged["fc1.bias"])
            return hidden @ merged["fc2.weight"].T + merged["fc2.bias"]

        for name in routers:
            block, own_gates = model.get_submodule(name), gates.setdefault(name, [])
            block.forward = lambda h, block=block, name=name, own=own_gates: run_block(block, h[0], name, own)[None]
        inside = tuple(name + "." for name in routers)
        merged = {name: theta[name] if name.startswith(inside) else arithmetic[name] for name in theta}

        class Features(nn.Module):
            def __init__(self, clip):
                super().__init__()
                self.clip = clip

            def forward(self, pixels):
                return features(self.clip, pixels)

        outputs.append(
            functional_call(Features(model), {f"clip.{k}": v for k, v in merged.items()}, (image[None],))[0]
        )
    return torch.stack(outputs), {name: torch.stack(own) for name, own in gates.items()}


def reference_routers(model, depth):
    """Copies of the model's router parameters, for the reference."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, WEMoEBlock):
            router = module.wemoe_router["default"]
            parameters = (
                router.hidden.weight if depth == 2 else None,
                router.hidden.bias if depth == 2 else None,
                router.weight if depth else None,
                router.bias,
            )
            found[name] = tuple(None if p is None else p.detach().clone().requires_grad_() for p in parameters)
    return found


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("way", ["merged", "output_space"])
def test_equals_the_loop_in_values_gates_and_gradients(base, finetuned, images, depth, way, monkeypatch):
    monkeypatch.setattr(ensembling, "output_space_is_cheaper", lambda tokens, tasks: way == "output_space")
    monkeypatch.setitem(ensembling.TILES, "cpu", (3, 700))  # several tiles, the last one short
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(router_depth=depth))
    stir_routers(model)
    routers = reference_routers(model, depth)
    expected, expected_gates = reference_features(base, finetuned, images, routers)

    gates = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, WEMoEBlock):
            module.wemoe_router["default"].register_forward_hook(
                lambda m, a, out, name=name: gates.update({name: out})
            )
    actual = features(model, images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for name, own in expected_gates.items():
        torch.testing.assert_close(gates[name].expand_as(own), own, rtol=0, atol=1e-10)

    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1), dtype=actual.dtype)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, parameters in routers.items():
        router = model.base_model.model.get_submodule(name).wemoe_router["default"]
        own = (*router.hidden.parameters(),) if depth == 2 else (None, None)
        for parameter, reference in zip((*own, router.weight, router.bias), parameters, strict=True):
            if reference is not None:
                assert parameter.grad.abs().max() > 1e-8
                torch.testing.assert_close(parameter.grad, reference.grad, rtol=0, atol=1e-10)


def test_the_gradient_of_merging_is_right_in_every_input(monkeypatch):
    monkeypatch.setitem(ensembling.TILES, "cpu", (2, 20))
    g = torch.Generator().manual_seed(0)
    x, gates, weight, bias, deltas = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in [(2, 4, 3), (2, 5), (7, 3), (2, 7), (5, 7, 3)]
    )
    inputs = [t.requires_grad_() for t in (x, gates, bias)]
    values, index = sparsify(deltas, 0.5)
    for stored in ((deltas, None), (values, index)):
        assert torch.autograd.gradcheck(
            lambda x, gates, bias, stored=stored: ensembling.MergedLinear.apply(x, gates, weight, bias, *stored),
            inputs,
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 4},
        {"sparsity": 0.9},
        {"shared_router": True},
        {"gates": "projection", "gate_rank": 4},
        {"gates": "projection", "rank": 8, "gate_rank": 4, "top_k": 2},
    ],
)
def test_an_image_does_not_depend_on_its_batch(base, finetuned, images, options):
    model = merge_finetuned(base, finetuned, WEMoEConfig(**options))
    stir_routers(model)
    with torch.no_grad():
        together = features(model, images)
        alone = torch.cat([features(model, image[None]) for image in images])
        shuffled = features(model, images[[2, 0, 3, 1]])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(together[[2, 0, 3, 1]], shuffled, rtol=0, atol=1e-10)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_starts_as_task_arithmetic(base, finetuned, images):
    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(router_depth=0, scaling=0.2))
    arithmetic = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in arithmetic.named_parameters():
            parameter += 0.2 * sum(m.get_parameter(name) - base.get_parameter(name) for m in finetuned.values())
        torch.testing.assert_close(features(model, images), features(arithmetic, images), rtol=0, atol=1e-10)


def test_a_gate_of_one_is_the_fine_tuned_model(base, finetuned, images):
    """With one task and λ = 1 there is nothing to merge: the MLPs and all the rest are the fine-tuned model's."""
    one = {"cars": finetuned["cars"]}
    for options in ({}, {"rank": 32}, {"gates": "projection", "rank": 32, "gate_rank": 8}):
        model = merge_finetuned(copy.deepcopy(base), one, WEMoEConfig(router_depth=0, scaling=1.0, **options))
        if "gates" in options:  # which leaves everything but linear layers as pretrained
            expected = copy.deepcopy(base)
            for name, module in expected.vision_model.encoder.named_modules():
                if isinstance(module, nn.Linear):
                    module.load_state_dict(finetuned["cars"].vision_model.encoder.get_submodule(name).state_dict())
        else:
            expected = finetuned["cars"]
        with torch.no_grad():
            torch.testing.assert_close(features(model, images), features(expected, images), rtol=0, atol=1e-9)


def vit_b32(**options) -> PeftModel:
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 32, "image_size": 224}))
        return get_peft_model(clip, WEMoEConfig(tasks=[f"task{i}" for i in range(8)], **options))


@pytest.mark.parametrize(
    ("options", "trainable"),
    [({}, 7_160_928), ({"shared_router": True}, 596_744), ({"router_depth": 1, "shared_router": True}, 6_152)],
)
def test_trainable_parameters_of_vit_b32_with_8_tasks_are_the_published_ones(options, trainable):
    assert vit_b32(**options).get_nb_trainable_parameters()[0] == trainable


def test_stored_task_vectors_of_vit_b32_are_as_small_as_promised():
    def stored(**options):
        state = vit_b32(**options).base_model.state_dict()
        return {n: t for n, t in state.items() if ".wemoe_" in n and ".wemoe_router." not in n}

    mlp = 4_722_432
    dense = stored()
    assert sum(t.numel() for t in dense.values()) == 8 * 12 * mlp  # 453 M
    low_rank = stored(rank=32)
    assert sum(t.numel() for n, t in low_rank.items() if "bias" not in n) == 8 * 12 * 32 * 2 * (768 + 3072)  # 23.6 M
    sparse = stored(sparsity=0.9)
    assert sum(t.numel() for n, t in sparse.items() if "delta" in n) == pytest.approx(
        0.1 * 8 * 12 * (mlp - 3840), rel=1e-5
    )
    size = {name: sum(t.numel() * t.element_size() for t in s.values()) for name, s in (("d", dense), ("s", sparse))}
    assert size["s"] < 0.21 * size["d"]  # a value and its place for one weight in ten


def test_truncation_is_the_best_of_its_rank_and_orthonormal():
    g = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 24), (3, 24, 40)):
        deltas = torch.randn(shape, generator=g, dtype=torch.float64)
        down, up = truncate(deltas, 5)
        u, s, vh = torch.linalg.svd(deltas, full_matrices=False)
        best = (u[..., :5] * s[:, None, :5]) @ vh[:, :5]
        torch.testing.assert_close(up.mT @ down, best, rtol=0, atol=1e-9)
        torch.testing.assert_close(down @ down.mT, torch.eye(5).double().expand(3, 5, 5), rtol=0, atol=1e-9)
        full_down, full_up = truncate(deltas, 30)  # more than there are
        torch.testing.assert_close(full_up.mT @ full_down, deltas, rtol=0, atol=1e-9)
    rank_two = torch.randn(1, 40, 2, generator=g) @ torch.randn(1, 2, 24, generator=g)
    down, up = truncate(rank_two, 6)
    torch.testing.assert_close(up.mT @ down, rank_two, rtol=0, atol=1e-4)
    assert down[:, 2:].abs().max() == 0  # no made-up directions for projection gates to look at


def test_sparse_keeps_the_largest_without_rescaling(base, finetuned):
    deltas = torch.randn(3, 20, 10, generator=torch.Generator().manual_seed(0))
    values, index = sparsify(deltas, 0.9)
    assert values.shape == index.shape == (3, 20) and index.dtype == torch.int32
    dense = densify(values, index, deltas.shape[1:])
    for task in range(3):
        threshold = deltas[task].abs().flatten().sort(descending=True).values[19]
        torch.testing.assert_close(dense[task], deltas[task].where(deltas[task].abs() >= threshold, torch.tensor(0.0)))

    model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(sparsity=0.75))
    linear = model.base_model.model.vision_model.encoder.layers[1].mlp.base_layer.fc2
    tau = (
        torch.stack([m.vision_model.encoder.layers[1].mlp.fc2.weight for m in finetuned.values()])
        - linear.base_layer.weight
    )
    expected = densify(*sparsify(tau.detach(), 0.75), tau.shape[1:])
    actual = densify(linear.wemoe_delta["default"], linear.wemoe_index["default"], tau.shape[1:])
    torch.testing.assert_close(actual, expected)


def test_low_rank_and_sparse_models_are_the_dense_model_of_what_they_store(base, finetuned, images):
    """Approximate the task vectors by hand, give them to the dense model, and compare."""
    for options in ({"rank": 3}, {"sparsity": 0.8}):
        model = merge_finetuned(copy.deepcopy(base), finetuned, WEMoEConfig(**options))
        stir_routers(model)
        approximated = {task: copy.deepcopy(m) for task, m in finetuned.items()}
        for name in [
            n for n, _ in base.named_parameters() if "vision_model" in n and ".mlp.fc" in n and "weight" in n
        ]:
            tau = torch.stack([m.get_parameter(name) - base.get_parameter(name) for m in finetuned.values()]).detach()
            if "rank" in options:
                u, s, vh = torch.linalg.svd(tau, full_matrices=False)
                tau = (u[..., :3] * s[:, None, :3]) @ vh[:, :3]
            else:
                tau = densify(*sparsify(tau, 0.8), tau.shape[1:])
            for m, delta in zip(approximated.values(), tau, strict=True):
                m.get_parameter(name).data = base.get_parameter(name) + delta
        dense = merge_finetuned(copy.deepcopy(base), approximated, WEMoEConfig())
        stir_routers(dense)
        with torch.no_grad():
            torch.testing.assert_close(features(model, images), features(dense, images), rtol=0, atol=1e-9)


def test_projection_follows_the_loop_over_tokens_and_experts(base, finetuned, images):
    rank, gate_rank, top_k = 6, 3, 2
    model = merge_finetuned(
        copy.deepcopy(base), finetuned, WEMoEConfig(gates="projection", rank=rank, gate_rank=gate_rank, top_k=top_k)
    )
    assert model.get_nb_trainable_parameters()[0] == 0
    for name in ("self_attn.q_proj", "mlp.fc2"):
        linear = model.base_model.model.vision_model.encoder.layers[0].get_submodule(name)
        assert isinstance(linear, WEMoELinear)
        plain = base.vision_model.encoder.layers[0].get_submodule(name)
        tuned = [m.vision_model.encoder.layers[0].get_submodule(name) for m in finetuned.values()]
        x = torch.randn(2, 5, plain.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.empty(2, 5, plain.out_features, dtype=torch.float64)
        for image in range(2):
            for token in range(5):
                h = x[image, token]
                logits, outputs = [], []
                for own in tuned:
                    u, s, vh = torch.linalg.svd((own.weight - plain.weight).detach(), full_matrices=False)
                    logits.append((vh[:gate_rank] @ h).norm())
                    outputs.append(u[:, :rank] @ (s[:rank] * (vh[:rank] @ h)) + (own.bias - plain.bias))
                p = torch.stack(logits).softmax(0)
                best = p.argsort(descending=True)[:top_k]
                expected[image, token] = plain(h) + sum(p[t] / p[best].sum() * outputs[t] for t in best)
        torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        norm = model.base_model.model.vision_model.post_layernorm.weight
        assert torch.equal(norm, base.vision_model.post_layernorm.weight)  # the rest stays pretrained


def test_router_means_after_the_hidden_layer():
    router = Router(6, 3, depth=2, scaling=0.3)
    x = torch.randn(2, 5, 6)
    by_token = torch.relu(x @ router.hidden.weight.T + router.hidden.bias) @ router.weight.T + router.bias
    torch.testing.assert_close(router(x), by_token.mean(1))
    torch.manual_seed(0)
    fresh = Router(512, 8, depth=2, scaling=0.4)
    assert torch.equal(fresh.bias, torch.full((8,), 0.4)) and torch.equal(fresh.hidden.bias, torch.zeros(512))
    assert fresh.hidden.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert fresh.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_only_what_is_needed_is_saved_for_backward():
    """The memory of a training step does not grow with images times weights."""
    saved = []
    images, tokens, width = 8, 2, 64
    x = torch.randn(images, tokens, width, requires_grad=True)
    gates = torch.randn(images, 3, requires_grad=True)
    weight, bias, deltas = torch.randn(4 * width, width), torch.randn(1, 4 * width), torch.randn(3, 4 * width, width)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ensembling.MergedLinear.apply(x, gates, weight, bias, deltas, None)
    distinct = {t.data_ptr(): t.numel() for t in saved}
    assert sum(distinct.values()) <= x.numel() + gates.numel() + weight.numel() + deltas.numel()


# --- PEFT's conduct -------------------------------------------------------------------------------------------------


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
