"""An adapted block against a plain, slow, per-sample reference: forward and all gradients, float64, 1e-10."""

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from peft_moe_merge import MoELoraMergeConfig

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
TASKS = ["a", "b", "c"]


def reference_mixture(x_BLD, ids, routers, experts, top_k, scaling):
    """`sum_{e in TopK} g_e * s * (relu(x A_e + a_e) B_e + b_e)`, sample by sample, expert by expert, as the equations are written."""
    out = []
    for x_LD, task in zip(x_BLD, ids, strict=True):
        if task == -1:
            out.append(x_LD.new_zeros(len(x_LD), experts[0][2].shape[1]))
            continue
        logits = [x_LD[0] @ column for column in routers[task].T]
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
        total = sum(logits[e].exp() for e in chosen)
        y = 0
        for e in chosen:
            A, a, B, b = experts[e]
            y = y + logits[e].exp() / total * scaling * (torch.relu(x_LD @ A.T + a) @ B + b)
        out.append(y)
    return torch.stack(out)


def reference_parameters(layer):
    experts, routers = layer.moe_lora_experts["default"], layer.moe_lora_routers["default"]
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    copies = [tuple(getattr(experts, n)[e].detach().clone().requires_grad_() for n in names) for e in range(6)]
    return [w.detach().clone().requires_grad_() for w in routers.weight], copies


def adapted(model, **kwargs):
    config = MoELoraMergeConfig(num_experts=6, top_k=2, r=4, lora_alpha=3.0, tasks=TASKS, **kwargs)
    model = get_peft_model(model.double(), config).eval()
    randomize(model)
    return model


def check_gradients(layer, routers, experts, trained_task=None, tolerance=TOLERANCE):
    bank = layer.moe_lora_experts["default"]
    for e, tensors in enumerate(experts):
        for name, expected in zip(("down_weight", "down_bias", "up_weight", "up_bias"), tensors, strict=True):
            actual = getattr(bank, name)[e].grad
            assert (actual is None) == (expected.grad is None), f"expert {e}: a gradient exactly where it was selected"
            if actual is not None:
                torch.testing.assert_close(actual, expected.grad, **tolerance)
    for task, expected in enumerate(routers):
        actual = layer.moe_lora_routers["default"].weight[task].grad
        if task == trained_task:
            torch.testing.assert_close(actual, expected.grad, **tolerance)
        else:
            assert actual is None, "only the current task's router trains"


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("expert_input", ["residual", "normalized"])
@pytest.mark.parametrize("ids", [[1, 1, 1, 1, 1], [1, -1, 0, 1, 2]])
def test_clip_block(tower, expert_input, ids):
    model = adapted(tiny_clip(), expert_input=expert_input)
    model.set_task("b")
    encoder = model.base_model.model.get_submodule(f"{tower}_model.encoder.layers.0")
    layer = encoder.mlp
    x = torch.randn(5, 7, encoder.embed_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()

    with model.route(torch.tensor(ids)):
        # the block's second half, as CLIPEncoderLayer computes it
        y1 = x1 + encoder.mlp(encoder.layer_norm2(x1))
    routers, experts = reference_parameters(layer)
    normalized = encoder.layer_norm2(x2)
    read = x2 if expert_input == "residual" else normalized
    y2 = x2 + layer.base_layer(normalized) + reference_mixture(read, ids, routers, experts, 2, 3.0 / 4)
    torch.testing.assert_close(y1, y2, **TOLERANCE)
    with torch.no_grad(), model.route(torch.tensor(ids)):  # which gathers the experts in another way
        torch.testing.assert_close(x1 + encoder.mlp(encoder.layer_norm2(x1)), y2, **TOLERANCE)

    weights = torch.randn(y1.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (y1 * weights).sum().backward()
    (y2 * weights).sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, **TOLERANCE)
    check_gradients(layer, routers, experts, trained_task=1)


@pytest.mark.parametrize("shape", [(5, 8), (5, 6, 8), (5, 2, 3, 8)])
def test_linear(shape):
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), target_modules=["0"])
    model.set_task("b")
    layer = model.base_model.model[0]
    ids = [1, -1, 0, 1, 2]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer.base_layer(x)
    routers, experts = reference_parameters(layer)
    y = y + reference_mixture(x.reshape(5, -1, 8), ids, routers, experts, 2, 3.0 / 4).reshape(y.shape)
    expected = model.base_model.model[2](F.relu(y))
    actual = model(x, task_ids=torch.tensor(ids))
    torch.testing.assert_close(actual, expected, **TOLERANCE)
    expected.square().sum().backward()
    expected_grad, x.grad = x.grad, None
    actual.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_grad, **TOLERANCE)
    check_gradients(layer, routers, experts, trained_task=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # the grouped product is the library's or ours
@pytest.mark.parametrize("ids", [None, [1, -1, 0, 1, 2]])
@pytest.mark.parametrize("shape", [(5, 8), (5, 6, 8), (5, 2, 3, 8)])
def test_linear_routed_by_token(shape, ids, dtype):
    torch.manual_seed(0)
    model = adapted(
        nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3)), target_modules=["0"], routing="token"
    ).to(dtype)
    model.set_task("b")
    layer = model.base_model.model[0]
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = layer.base_layer(x)
    routers, experts = reference_parameters(layer)
    tokens = x.reshape(-1, 1, 8)  # to the reference, every token is a sample
    token_ids = torch.tensor(ids or [1] * 5).repeat_interleave(len(tokens) // 5).tolist()
    y = y + reference_mixture(tokens, token_ids, routers, experts, 2, 3.0 / 4).reshape(y.shape)
    expected = model.base_model.model[2](F.relu(y))
    actual = model(x) if ids is None else model(x, task_ids=torch.tensor(ids))
    tolerance = TOLERANCE if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(actual, expected, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model(x, **({"task_ids": torch.tensor(ids)} if ids else {})), expected, **tolerance)
    expected.square().sum().backward()
    expected_grad, x.grad = x.grad, None
    actual.square().sum().backward()
    torch.testing.assert_close(x.grad, expected_grad, **tolerance)
    check_gradients(layer, routers, experts, trained_task=1, tolerance=tolerance)
    model.train()
    model(x)
    assert model.expert_usage()["0"].sum() == 2 * len(tokens), "every token counts"


def test_mlp_blocks_are_not_routed_by_token(clip):
    with pytest.raises(ValueError, match="routing='token' is for `nn.Linear` targets"):
        get_peft_model(clip, MoELoraMergeConfig(routing="token"))


def test_one_token_0_decides_for_all_tokens():
    torch.manual_seed(0)
    model = adapted(nn.Sequential(nn.Linear(8, 8)), target_modules=["0"])
    routed = model.base_model.model[0].moe_lora_routers["default"]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    seen = []
    handle = routed.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    model(x)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], x[:, 0])


def test_experts_nobody_selects_are_not_computed(monkeypatch):
    model = adapted(tiny_clip())
    bank = model.base_model.model.vision_model.encoder.layers[0].mlp.moe_lora_experts["default"]
    batch = tiny_batch()
    before = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).logits_per_image
    model.train()
    model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    usage = model.expert_usage()["vision_model.encoder.layers.0.mlp"]
    model.eval()
    with torch.no_grad():  # poison: a NaN weight times a zero gate would still show
        indices, _ = model.base_model.model.vision_model.encoder.layers[0].mlp.moe_lora_routers["default"](
            torch.zeros(1, 32, dtype=torch.float64), [0], 2
        )
    assert usage.sum() == 2 * 4 and indices.shape == (1, 2)
    chosen = set()
    hook = (
        model.base_model.model.vision_model.encoder.layers[0]
        .mlp.moe_lora_routers["default"]
        .register_forward_hook(lambda module, args, output: chosen.update(output[0].flatten().tolist()))
    )
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    model(**inputs)
    hook.remove()
    assert len(chosen) < 6
    with torch.no_grad():
        for expert in set(range(6)) - chosen:
            bank.down_weight[expert].fill_(float("nan"))
    assert torch.equal(model(**inputs).logits_per_image, before)


def test_inference_compiles_without_graph_breaks():
    """Whatever is selected: the graph of one batch serves the next, for one task and for several."""
    model = adapted(tiny_clip())
    block = model.base_model.model.vision_model.encoder.layers[0]
    graphs = CompileCounter()
    compiled = torch.compile(block, backend=graphs, fullgraph=True)
    for ids in (None, [1, -1, 0, 1]):
        for seed in (0, 1, 2):
            x = torch.randn(4, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad(), model.route(None if ids is None else torch.tensor(ids)):
                torch.testing.assert_close(compiled(x, None), block(x, None), **TOLERANCE)
    assert graphs.frame_count == 2


def test_routers_decide_while_the_base_layer_is_still_to_run():
    """So that, on a GPU, nobody waits for the decision."""
    model = adapted(tiny_clip())
    mlp = model.base_model.model.vision_model.encoder.layers[0].mlp
    order = []
    for name, module in (("router", mlp.moe_lora_routers["default"]), ("base layer", mlp.base_layer)):
        module.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    mlp.moe_lora_experts["default"].register_forward_pre_hook(lambda module, args: order.append("experts"))
    model.get_image_features(tiny_batch()["pixel_values"].double())
    assert order == ["router", "base layer", "experts"]


def test_dropout_falls_on_hidden_units():
    """With dropout p, hidden units are 0 or scaled by 1/(1-p): an expert with one hidden unit shows both."""
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=1, top_k=1, r=1, lora_alpha=1.0, lora_dropout=0.25, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(1, 1)), config)
    bank = model.base_model.model[0].moe_lora_experts["default"]
    with torch.no_grad():
        for name, value in (("down_weight", 1.0), ("down_bias", 0.0), ("up_weight", 1.0), ("up_bias", 0.5)):
            getattr(bank, name)[0].fill_(value)
    x = torch.full((4000, 1), 3.0)
    added = (model(x) - model.base_model.model[0].base_layer(x)).flatten()
    dropped = (added - 0.5).abs() < 1e-5
    assert ((added - 4.5).abs() < 1e-5).sum() + dropped.sum() == 4000
    assert 0.22 < dropped.float().mean() < 0.28
    added = model.eval()(x) - model.base_model.model[0].base_layer(x)
    torch.testing.assert_close(added, torch.full_like(added, 3.5))


def test_fresh_adapter_changes_nothing(clip, batch):
    before = clip(**batch)
    model = get_peft_model(clip, MoELoraMergeConfig(num_experts=6, r=4))
    for mode in (model.eval(), model.train()):
        after = mode(**batch)
        assert torch.equal(after.logits_per_image, before.logits_per_image)


def test_parameters_are_the_papers():
    from transformers import CLIPConfig, CLIPModel

    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config={"patch_size": 16}))
        model = get_peft_model(clip, MoELoraMergeConfig(num_experts=55, tasks=[f"task {i}" for i in range(11)]))
    adapter = sum(parameter.numel() for name, parameter in model.named_parameters() if "moe_lora_" in name)
    assert adapter == 127_649_280
    assert adapter * 4 / 2**20 == pytest.approx(486.94, abs=0.01)


def test_initial_expert_weights():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(400, 30)), MoELoraMergeConfig(num_experts=3, r=64, target_modules=["0"])
    )
    for expert in range(3):
        tensors = model.expert_parameters("0", expert)
        assert [tuple(tensors[n].shape) for n in ("down_weight", "down_bias", "up_weight", "up_bias")] == [
            (400, 64),
            (64,),
            (64, 30),
            (30,),
        ]
        bound = 400**-0.5  # Kaiming-uniform with a = sqrt(5): sqrt(6 / ((1 + 5) * fan_in))
        assert 0.99 * bound < tensors["down_weight"].abs().max() <= bound
        assert not any(tensors[n].any() for n in ("down_bias", "up_weight", "up_bias"))
    router = model.router_parameters("0", "default")
    assert router["weight"].shape == router["noise_weight"].shape == (400, 3)
    assert not router["weight"].any() and not router["noise_weight"].any()
