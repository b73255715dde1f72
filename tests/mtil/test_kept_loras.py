"""Methods that keep the LoRA of every task: what becomes of the weights, against sums written out."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_methods import SETTINGS, logits_of, make, some_batch, tasks

from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.lora import TARGETS
from peft_moe_merge.mtil.methods.magmax import largest

KEPT = ["o_lora", "lora_soup", "magmax"]


def train_somehow(method, task, seed):
    """Let a task begin, give its LoRA weights as if it had learnt, and end it: the products by layer, in float64."""
    method.begin_task(task)
    generator = torch.Generator().manual_seed(seed)
    products, factors = {}, dict(method.model.named_parameters())
    with torch.no_grad():
        for name, down in factors.items():
            if ".lora_A." in name:
                up = factors[name.replace(".lora_A.", ".lora_B.")]
                for factor in (down, up):
                    factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
                layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                products[layer] = up.double() @ down.double()
    method.end_task()
    return products


def element_by_element(vectors):
    chosen = torch.empty_like(vectors[0])
    for place in range(chosen.numel()):
        values = [vector.flatten()[place].item() for vector in vectors]
        chosen.view(-1)[place] = max(values, key=abs)
    return chosen


def expected_change(name, products):
    """What a layer's weight has been changed by after these LoRAs."""
    if name == "lora_soup":
        return sum(products) / len(products)
    if name == "magmax":
        return element_by_element([sum(products[: count + 1]) for count in range(len(products))])
    return sum(products)


@pytest.mark.parametrize("name", KEPT)
def test_weights_after_each_task(name, make, tasks, tmp_path):
    method = make(name)
    before = {name: weight.double().clone() for name, weight in method.model.state_dict().items()}
    products = []
    for seed, task in enumerate(tasks):
        products.append(train_somehow(method, task, seed))
        after = method.model.state_dict()
        assert after.keys() == before.keys()
        for weight_name, weight in after.items():
            layer = weight_name.removesuffix(".weight")
            expected = before[weight_name]
            if layer in products[0]:
                expected = expected + expected_change(name, [of_task[layer] for of_task in products])
            torch.testing.assert_close(weight.double(), expected, atol=1e-5, rtol=0)
    towers, layers = 2, 3
    assert len(products[0]) == towers * layers * len(TARGETS)

    method.save(tmp_path)
    loaded = make(name)
    loaded.load(tmp_path)
    assert all(torch.equal(weight, after[key]) for key, weight in loaded.model.state_dict().items())
    numbers = sum(tensor.numel() for tensor in load_file(tmp_path / "loras.safetensors").values())
    assert numbers == len(tasks) * sum(sum(p.shape) * SETTINGS.lora_r for p in products[0].values()), "and no more"


@pytest.mark.parametrize("name", KEPT)
def test_where_a_task_starts(name, make, tasks):
    """The soup's from the pretrained CLIP, the others' from where the sequence has come to."""
    method = make(name)
    texts, pixels = tasks[0].prompts("a {}."), some_batch()["pixel_values"]
    plain = logits_of(method, method.model, pixels, texts)
    products = [train_somehow(method, task, seed) for seed, task in enumerate(tasks[:2])]
    sequence = make(name).model
    with torch.no_grad():
        for layer, first in products[0].items():
            sequence.get_submodule(layer).weight += (first + products[1][layer]).float()
    expected = plain if name == "lora_soup" else logits_of(method, sequence, pixels, texts)
    method.begin_task(tasks[2])
    torch.testing.assert_close(logits_of(method, method.model, pixels, texts), expected, atol=1e-3, rtol=1e-3)
    trained = [key for key, weight in method.model.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in key for key in trained)


def test_rslora_is_part_of_what_is_kept(make, tasks):
    settings = MethodSettings(**{**vars(SETTINGS), "use_rslora": True})
    method = make("o_lora", settings)
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    before = method.model.get_submodule(layer).weight.double().clone()
    product = train_somehow(method, tasks[0], 0)[layer]
    after = method.model.get_submodule(layer).weight.double()
    torch.testing.assert_close(after, before + product * SETTINGS.lora_r**0.5, atol=1e-5, rtol=0)


def test_largest_keeps_the_sign():
    vectors = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(vectors), element_by_element(list(vectors)))
    assert largest(torch.tensor([[[-2.0]], [[1.0]]])).item() == -2.0


def test_magmax_scaling(make, tasks):
    method = make("magmax", MethodSettings(**{**vars(SETTINGS), "magmax_scaling": 0.5}))
    before = copy.deepcopy(method.model.state_dict())
    products = train_somehow(method, tasks[0], 0)
    for layer, product in products.items():
        change = method.model.get_submodule(layer).weight - before[f"{layer}.weight"]
        torch.testing.assert_close(change.double(), product / 2, atol=1e-5, rtol=0)


def test_o_lora_adds_the_squared_products_of_down_projections(make, tasks):
    weight = 0.3
    method = make("o_lora", MethodSettings(**{**vars(SETTINGS), "o_lora_weight": weight}))
    plain, batch = METHODS["lora"].loss, some_batch()
    method.begin_task(tasks[0])
    assert method.loss(method.model, batch).item() == plain(method, method.model, batch).item(), "no other to avoid"
    for seed, task in enumerate(tasks[:2]):
        train_somehow(method, task, seed) if seed else method.end_task()
    method.begin_task(tasks[2])

    overlap = 0.0
    now = {key: factor for key, factor in method.model.named_parameters() if ".lora_A." in key}
    for key, new in now.items():
        layer = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
        for lora in method.loras:
            for row in new.tolist():
                for old in lora[layer][0].tolist():
                    overlap += sum(a * b for a, b in zip(row, old, strict=True)) ** 2
    expected = plain(method, method.model, batch).item() + weight * overlap
    loss = method.loss(method.model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)

    # turned away from all earlier ones, a LoRA pays nothing
    with torch.no_grad():
        for key, new in now.items():
            layer = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            old = torch.linalg.qr(torch.cat([lora[layer][0] for lora in method.loras]).T.double())[0]
            new.copy_((new.double() - new.double() @ old @ old.T).float())
    assert method.overlap().item() == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("settings", [{"o_lora_weight": -0.1}, {"magmax_scaling": 0.0}])
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must"):
        MethodSettings(**settings)
