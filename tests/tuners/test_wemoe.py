"""The WEMoE method against a plain loop over images, tasks and tensors written here."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import CLIPConfig, CLIPModel
from wemoe_clip import TASKS, base, features, finetuned, images, small_clip, stir_routers

from peft_moe_merge.tuners.wemoe import WEMoEConfig, ensembling, merge_finetuned
from peft_moe_merge.tuners.wemoe.layer import WEMoEBlock, WEMoELinear
from peft_moe_merge.tuners.wemoe.router import Router
from peft_moe_merge.tuners.wemoe.task_vectors import densify, sparsify, truncate


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
@pytest.mark.parametrize("way", ["merged", "merged, 32 rows at a time", "output_space"])
def test_equals_the_loop_in_values_gates_and_gradients(base, finetuned, images, depth, way, monkeypatch):
    monkeypatch.setattr(ensembling, "output_space_is_cheaper", lambda tokens, tasks: way == "output_space")
    # several tiles, the last one short; or fc1 in two tiles of 32 rows where there is room for 40
    monkeypatch.setitem(ensembling.TILES, "cpu", (3, 3 * 32 * 40 if "32" in way else 700, 1))
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
    monkeypatch.setitem(ensembling.TILES, "cpu", (2, 20, 3))
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
