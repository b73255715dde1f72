"""Low precision: routers decide in float32, steps that a scaler skips do not count, frozen experts stay under any optimizer."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from torch import nn

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.routing import top_k_gates

EXPERTS, TOP_K = 6, 2


def adapted(dtype=torch.float32, **kwargs):
    torch.manual_seed(0)
    clip = tiny_clip().to(dtype)
    return get_peft_model(clip, MoELoraMergeConfig(**{"num_experts": EXPERTS, "r": 4, "tasks": ["a", "b"], **kwargs}))


def decisions(model, batch):
    """What routers saw and decided in one forward pass, per block."""
    seen = {}
    hooks = [
        routers.register_forward_hook(lambda module, args, output, name=name: seen.update({name: (args[0], *output)}))
        for name, routers in model.router_banks().items()
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_routers_decide_in_float32_under_bf16_autocast(base_dtype):
    model = adapted(base_dtype, num_experts=64).eval()  # among many some scores are close
    randomize(model)
    batch = tiny_batch(images=64)
    batch["pixel_values"] = batch["pixel_values"].to(base_dtype)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = decisions(model, batch)
    rounded_differently = 0
    for block, (x_BD, indices_BK, gates_BK) in seen.items():
        weight_DE = model.router_parameters(block, "a")["weight"]
        assert weight_DE.dtype == gates_BK.dtype == torch.float32
        expected_BK, expected_gates_BK = top_k_gates(x_BD.float() @ weight_DE, TOP_K)
        assert torch.equal(indices_BK, expected_BK)
        torch.testing.assert_close(gates_BK, expected_gates_BK)
        half_BK, _ = top_k_gates(x_BD.bfloat16() @ weight_DE.bfloat16(), TOP_K)
        rounded_differently += int((half_BK != indices_BK).any(dim=1).sum())
    assert rounded_differently, "half precision would have decided otherwise for some sample"


def test_training_under_bf16_autocast_keeps_weights_and_gradients_in_float32():
    model = adapted().train()
    with torch.autocast("cpu", torch.bfloat16):
        seen = decisions(model, tiny_batch())
        loss = model(**tiny_batch()).logits_per_image.float().square().mean()
    loss.backward()
    assert all(gates_BK.dtype == torch.float32 for _, _, gates_BK in seen.values())
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert any("routers.default.weight" in name for name in trained) and any("up_weight" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {p.grad.dtype for p in trained.values()} == {torch.float32}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "moe_lora" in name}


@pytest.mark.parametrize("wrapped", [True, False])
def test_steps_that_a_gradient_scaler_skips_did_not_happen(wrapped):
    """Real overflows: the scale begins far beyond what fp16 holds and comes down by skipped steps."""
    model, callback = adapted(lora_dropout=0.0).train(), ExpertMergeCallback(merge_every=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32, backoff_factor=2.0**-6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    if wrapped:
        Accelerator(cpu=True)
        optimizer = AcceleratedOptimizer(optimizer, scaler=scaler)
    callback.begin_task(model)
    skipped = taken = 0
    for step in range(14):
        before = snapshot(model)
        with torch.autocast("cpu", torch.float16):
            logits = model(**tiny_batch(seed=step)).logits_per_image
        loss = nn.functional.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0]))
        scaler.scale(loss).backward()
        if wrapped:
            optimizer.step()
        else:
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            optimizer.step_was_skipped = scaler.get_scale() < scale
        optimizer.zero_grad()
        merges = len(callback.merges)
        callback.step(model, optimizer)
        if optimizer.step_was_skipped:
            skipped += 1
            assert len(callback.merges) == merges
            after = snapshot(model)
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "not even counted"
        else:
            taken += 1
    assert skipped >= 2 and taken >= 7
    assert callback.steps == taken and [step for step, _ in callback.merges] == list(range(3, taken + 1, 3))
    for block, counts in model.expert_usage().items():
        assert counts.sum() == taken * TOP_K * (3 if block.startswith("text") else 4)


class Adam8bit(torch.optim.Optimizer):
    """AdamW whose moments are 8-bit numbers with one scale a tensor; made anew from them at each step."""

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name, beta, new in (("first", 0.9, parameter.grad), ("root", 0.99, parameter.grad.square())):
                    old, scale = state.get(name, (torch.zeros_like(parameter, dtype=torch.int8), 0.0))
                    moment = old.float() * scale
                    if name == "root":  # of the second moment, whose range is too wide for 8 bits
                        moment = (beta * moment.square() + (1 - beta) * new).sqrt()
                    else:
                        moment = beta * moment + (1 - beta) * new
                    scale = float(moment.abs().max().clamp_min(1e-30) / 127)
                    state[name] = ((moment / scale).round().to(torch.int8), scale)
                first, root = (numbers.float() * scale for numbers, scale in (state["first"], state["root"]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * first / (root + 1e-3))


def adam8bit_of_bitsandbytes(parameters, lr, weight_decay):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=lr, weight_decay=weight_decay, min_8bit_size=1)


@pytest.mark.parametrize("make", [Adam8bit, adam8bit_of_bitsandbytes])
@pytest.mark.parametrize("foreach", [True, False])
def test_eight_bit_optimizers_and_clipping_leave_frozen_experts_alone(make, foreach):
    """One optimizer for both tasks: moments and weight decay from before the freeze, gradients clipped all together."""
    model = adapted().train()
    optimizer = make(list(model.parameters()), lr=1e-2, weight_decay=0.1)
    callback = ExpertMergeCallback(merge_every=4)
    frozen, moved = {}, set()
    for task in "ab":
        model.set_task(task)
        callback.begin_task(model)
        for step in range(10):
            before = snapshot(model)
            unshared = {b: c.clone() for b, c in model.expert_usage().items()}
            loss = model(**tiny_batch(seed=step)).logits_per_image.square().mean()
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            for (block, expert), tensors in frozen.items():
                name = f"base_model.model.{block}.moe_lora_experts.default.down_weight.{expert}"
                assert name not in gradients and tensors
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=foreach)
            expected = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            torch.testing.assert_close(norm, expected)
            optimizer.step()
            optimizer.zero_grad()
            selected = {b: (counts - unshared[b]).bool() for b, counts in model.expert_usage().items()}
            after = snapshot(model)
            for block, taken_E in selected.items():
                for expert in range(EXPERTS):
                    name = f"base_model.model.{block}.moe_lora_experts.default.up_bias.{expert}"
                    if not torch.equal(before[name], after[name]):
                        assert taken_E[expert], f"{name} moved unselected"
                        moved.add((block, expert))
            callback.step(model, optimizer)
        callback.end_task(model)
        for (block, expert), tensors in frozen.items():
            now = model.expert_parameters(block, expert)
            assert all(torch.equal(tensor, now[name]) for name, tensor in tensors.items()), (task, block, expert)
        for block, experts in model.frozen_experts().items():
            for expert in experts:
                frozen.setdefault((block, expert), copy.deepcopy(model.expert_parameters(block, expert)))
    assert [step for step, _ in callback.merges] == [4, 8] and len(frozen) >= 8 and len(moved) >= 8
    assert any(block_expert in moved for block_expert in frozen), "some had moments when they froze"
