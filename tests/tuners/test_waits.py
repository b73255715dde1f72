"""Who waits for the device in a training step? Counted without one: every call that would need a value on the host."""

import pytest
import torch
from conftest import tiny_batch, tiny_clip
from peft import get_peft_model
from torch.overrides import TorchFunctionMode

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig

WAITS = {
    "item",
    "tolist",
    "nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "numpy",
    "cpu",
    "unique",
    "allclose",
}

PROMPTS = ["tolist"]


class Waits(TorchFunctionMode):
    """Notes the calls by which a program asks for a tensor's content, or for a shape that depends on it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        by_mask = name in ("__getitem__", "__setitem__") and any(
            isinstance(key, torch.Tensor) and key.dtype == torch.bool
            for key in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in WAITS or by_mask or (function is torch.where and len(args) == 1):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def waits_in_a_step(config, steps=2):
    """Count by name what a step after the first one waits for, in the model, the backward pass, the optimizer and counting.

    By plain SGD: Adam reads its counts of steps, which it keeps on the host.
    """
    model = get_peft_model(tiny_clip(), config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=True)
    merging = ExpertMergeCallback(merge_every=None)
    merging.begin_task(model)
    labels = torch.tensor([0, 1, 2, 0])
    for _ in range(steps):
        # CLIP's own: transformers looks where prompts end
        with Waits() as own:
            tiny_clip()(**tiny_batch())
        with Waits() as mode:
            loss = torch.nn.functional.cross_entropy(model(**tiny_batch()).logits_per_image, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            merging.step(model, optimizer)
    for name in own.seen:
        mode.seen.remove(name)
    return sorted(mode.seen)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_pool_waits_for_no_expert(experts):
    """But once a call, before the text tower runs, for how long the prompts are and whether they begin alike."""
    config = MoELoraMergeConfig.pool(tasks=["a", "b"], r=4, experts_per_task=experts, top_k=experts)
    assert waits_in_a_step(config) == PROMPTS


def test_shared_experts_wait_once_a_block():
    """The host has to know which experts were chosen, since only these may get a gradient: one list per block, no more."""
    blocks = 4
    assert waits_in_a_step(MoELoraMergeConfig(num_experts=6, r=4, tasks=["a"])) == PROMPTS + ["tolist"] * blocks


def test_what_is_counted_would_be_seen():
    with Waits() as mode:
        x = torch.arange(3.0)
        bool(x.sum() > 0), x.sum().item(), x[x > 1], x.nonzero(), x.tolist()
    assert sorted(mode.seen) == ["__bool__", "__getitem__", "item", "nonzero", "tolist"]
