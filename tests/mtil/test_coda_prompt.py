"""CODA-Prompt against its equations, image by image and head by head."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
import torch.nn.functional as F
from small_methods import SETTINGS, make, some_batch, tasks

from peft_moe_merge.mtil.methods import MethodSettings


@pytest.fixture
def coda(make):
    def method(**changed):
        return make("coda_prompt", MethodSettings(**{**vars(SETTINGS), **changed}))

    return method


def disturbed_tasks(method, tasks):
    """Let tasks begin one after another, each with components as if it had learnt."""
    generator = torch.Generator().manual_seed(0)
    for task in tasks:
        method.begin_task(task)
        with torch.no_grad():
            for weight in method.trainable_parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def reference(clip, components, pixels):
    """Encode one image; `components` are triples of prompt, key and attention, per block."""
    clip = clip.double()
    vision = clip.vision_model
    query = vision(pixel_values=pixels[None]).pooler_output[0]
    x = vision.pre_layrnorm(vision.embeddings(pixels[None]))[0]
    for block, layer in enumerate(vision.encoder.layers):
        prompt = None
        for part, key, attention in components.get(block, []):
            seen = query * attention
            weight = (seen @ key) / (seen.norm() * key.norm())
            prompt = weight * part if prompt is None else prompt + weight * part
        normed, attend = layer.layer_norm1(x), layer.self_attn
        queries, keys, values = attend.q_proj(normed), attend.k_proj(normed), attend.v_proj(normed)
        if prompt is not None:
            half = len(prompt) // 2
            keys, values = torch.cat([prompt[:half], keys]), torch.cat([prompt[half:], values])
        width, outputs = attend.head_dim, []
        for head in range(attend.num_heads):
            own = slice(head * width, (head + 1) * width)
            scores = queries[:, own] @ keys[:, own].T / width**0.5
            outputs.append(scores.softmax(dim=1) @ values[:, own])
        x = x + attend.out_proj(torch.cat(outputs, dim=1))
        x = x + layer.mlp(layer.layer_norm2(x))
    return clip.visual_projection(vision.post_layernorm(x[0]))


@pytest.mark.parametrize("layers", [2, 9])
def test_encoding_by_the_equations(coda, tasks, layers):
    method = coda(coda_layers=layers, coda_components=3, coda_length=4)
    disturbed_tasks(method, tasks[:2])
    pixels = some_batch(size=3)["pixel_values"]
    with torch.no_grad():
        features = method.model(pixels)
    kinds = [method.model.joined(kind).double() for kind in ("prompts", "keys", "attention")]
    blocks = min(layers, 3)
    assert [kind.shape for kind in kinds] == [(blocks, 6, 4, 64), (blocks, 6, 64), (blocks, 6, 64)]
    components = {
        block: [tuple(kind[block, one] for kind in kinds) for one in range(6)]
        for block in range(blocks)
    }  # fmt: skip
    for image, row in zip(pixels.double(), features, strict=True):
        torch.testing.assert_close(reference(method.model.clip, components, image).float(), row, atol=1e-4, rtol=1e-4)


def test_loss_by_the_equations(coda, tasks):
    weight, batch = 0.3, some_batch()
    method = coda(coda_weight=weight, coda_components=2, coda_length=2, coda_layers=2)
    disturbed_tasks(method, tasks[:2])
    with torch.no_grad():
        images = F.normalize(method.model(batch["pixel_values"]), dim=1)
        tokens = method.tokenize(tasks[1].prompts(tasks[1].templates[0]))
        texts = F.normalize(method.model.clip.get_text_features(**tokens).pooler_output, dim=1)
        logits = method.model.clip.logit_scale.exp() * images @ texts.T
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.2).item()
    for kind in ("prompts", "keys", "attention"):
        for block in method.model.joined(kind).flatten(2).tolist():
            for i, one in enumerate(block):
                for j, other in enumerate(block):
                    product = sum(a * b for a, b in zip(one, other, strict=True))
                    expected += weight * (product - (i == j)) ** 2 / len(block) ** 2
    loss = method.loss(method.model, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.trainable_parameters())


def test_new_components_are_orthonormal_and_old_ones_stay(coda, tasks):
    method = coda(coda_components=5)
    for position, task in enumerate(tasks):
        method.begin_task(task)
        trained = {name for name, weight in method.model.named_parameters() if weight.requires_grad}
        assert trained == {f"tasks.{position}.{kind}" for kind in ("prompts", "keys", "attention")}
    assert method.model.overlap().item() == pytest.approx(0, abs=1e-9)
    for kind in ("prompts", "keys", "attention"):
        rows = method.model.joined(kind)[0].flatten(1).double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(15).double(), atol=1e-5, rtol=0)

    crowded = coda(coda_components=40)  # two tasks have more than the 64 directions of a key
    disturbed_tasks(crowded, tasks[:1])
    crowded.begin_task(tasks[1])
    keys = crowded.model.tasks[1].keys
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(keys.shape[:2]))


@pytest.mark.parametrize(
    "changed",
    [{"coda_components": 0}, {"coda_length": 3}, {"coda_layers": 0}, {"coda_weight": -1.0}, {"coda_lr": 0.0}],
)
def test_settings_are_checked(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` must"):
        MethodSettings(**changed)
