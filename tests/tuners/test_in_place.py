"""Served, the experts' sum is written over the base layer's output, but only where nobody else has that output."""

import pytest
import torch
from pools import IN, WIDTHS, inputs, net_pool
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

ROUTES = {
    "one task": None,
    "several tasks": torch.tensor([0, 2, 1, 0, 2]),
    "some plain": torch.tensor([0, -1, 1, -1, 2]),
}
each_route = pytest.mark.parametrize("task_ids", ROUTES.values(), ids=ROUTES.keys())


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))

    def adding(self):
        """What added to the layers' outputs: no base layer of `Net` calls a batched product, or adds without a bias."""
        return [name for name in self.names if name.startswith(("addmm_", "baddbmm_", "index_add_"))]


def served(model, task_ids):
    with torch.no_grad():
        return model(inputs(5, 4), task_ids=task_ids)


@each_route
def test_it_is_what_is_computed_with_gradients(task_ids):
    model = net_pool().eval()
    expected = model(inputs(5, 4), task_ids=task_ids)
    assert expected.requires_grad
    with Calls() as calls:
        answer = served(model, task_ids)
    assert len(calls.adding()) == len(WIDTHS)
    torch.testing.assert_close(answer, expected.detach(), rtol=1e-13, atol=1e-13)


def hooked(layer, kept):
    return layer.register_forward_hook(lambda module, args, output: kept.append(output))


def hooked_everywhere(layer, kept):
    return register_module_forward_hook(
        lambda module, args, output: kept.append(output) if module is layer else None,
    )


def replaced(layer, kept):
    plain = layer.forward

    def forward(x):
        kept.append(plain(x))
        return kept[-1]

    layer.forward = forward

    class Handle:
        def remove(self):
            del layer.forward

    return Handle()


@each_route
@pytest.mark.parametrize("listen", [hooked, hooked_everywhere, replaced])
def test_who_listens_to_the_base_layer_keeps_what_he_heard(listen, task_ids):
    model = net_pool().eval()
    expected, kept = served(model, task_ids), []
    layer = model.get_base_model().first.get_base_layer()
    handle = listen(layer, kept)
    try:
        torch.testing.assert_close(served(model, task_ids), expected, rtol=1e-13, atol=1e-13)
    finally:
        handle.remove()
    (heard,) = kept
    torch.testing.assert_close(heard, nn.functional.linear(inputs(5, 4), layer.weight, layer.bias))


class Same(nn.Linear):
    """A layer of another kind, which returns what it reads."""

    def forward(self, x):
        return x


@each_route
def test_the_input_of_a_layer_that_returns_it_is_not_written_to(task_ids):
    model = net_pool().eval()
    for name in WIDTHS:
        layer = getattr(model.get_base_model(), name)
        layer.base_layer = Same(IN, IN).double()
    bank = model.expert_banks()["first"]
    for parameter in bank.up_weight:
        parameter.data = parameter.data[:, :IN].contiguous()
    x = inputs(5, 4)
    with torch.no_grad(), model.route(task_ids):
        added = model.get_base_model().first(x) - x
    assert torch.equal(x, inputs(5, 4)) and added.abs().sum() > 0
