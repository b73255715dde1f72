"""A selector in the model: it routes when nobody else does, and travels with the adapter."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import VISION, randomize, tiny_batch, tiny_clip, without_checksums
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import CLIPVisionModel
from transformers.models.clip.configuration_clip import CLIPVisionConfig

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.selection import AlexNetFeatures, GaussianSelector, ImageFeatures, PatchTokens, load_selector

SOURCES = [PatchTokens(1), ImageFeatures()]


def images(task, count=300, seed=0):
    """Images of a task: noise of its own brightness."""
    generator = torch.Generator().manual_seed(10 * task + seed)
    return torch.randn(count, 3, 16, 16, generator=generator) + 2.0 * (task - 1)


def adapted(base=None, tasks=("a", "b", "c")):
    torch.manual_seed(0)
    model = get_peft_model(base or tiny_clip(), MoELoraMergeConfig(num_experts=6, r=4, tasks=list(tasks)))
    randomize(model)
    return model.eval()


def selector_for(model, source, tasks=("a", "b", "c"), **options):
    selector = GaussianSelector(source, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for position, task in enumerate(tasks):
            selector.fit(task, model.frozen_features(source, images(position)))
    return selector


def mixed_batch():
    stripes = torch.tensor([4.0, -4.0]).repeat(8).expand(2, 3, 16, 16)  # like no task
    pixels = torch.cat([*(images(task, count=3, seed=1) for task in (1, 0, 2)), stripes])
    return {**tiny_batch(), "pixel_values": pixels}


@pytest.mark.parametrize("source", SOURCES)
def test_frozen_features_are_the_base_models(source):
    model, clip, pixels = adapted(), tiny_clip(), images(0)
    features = model.frozen_features(source, pixels)
    with torch.no_grad():
        if isinstance(source, ImageFeatures):
            expected = (
                torch.nn.functional.normalize(clip.get_image_features(pixels).pooler_output, dim=1) * 4
            )  # sqrt 16
        else:
            patches = clip.vision_model(pixels, output_hidden_states=True).hidden_states[1][:, 1:]
            expected = torch.cat([patches.mean(dim=1), patches.std(dim=1, correction=0)], dim=1)
    torch.testing.assert_close(features, expected)
    model.set_task(None)
    assert torch.equal(model.frozen_features(source, pixels), features)


@pytest.mark.parametrize("source", SOURCES)
@torch.no_grad()
def test_it_routes_each_image(source):
    model, batch = adapted(), mixed_batch()
    without = model(**batch).logits_per_image
    model.attach_selector(selector_for(model, source, reject_rate=0.01))
    ids, scores = model.select_tasks(batch["pixel_values"])
    assert ids.tolist()[:9] == [1] * 3 + [0] * 3 + [2] * 3 and ids.tolist()[9:] == [-1, -1] and scores.shape == (11, 3)

    chosen = model(**batch).logits_per_image
    torch.testing.assert_close(chosen, model(**batch, task_ids=ids).logits_per_image)
    assert not torch.allclose(chosen, without, atol=1e-3)
    expected = tiny_clip()(**batch).logits_per_image[9:]
    torch.testing.assert_close(chosen[9:], expected)
    for row, image in enumerate(batch["pixel_values"]):  # alone as among others
        alone = model(**{**batch, "pixel_values": image[None]}).logits_per_image
        torch.testing.assert_close(alone[0], chosen[row], rtol=1e-4, atol=1e-4)
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(features, model.get_image_features(batch["pixel_values"], task_ids=ids).pooler_output)
    named = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    torch.testing.assert_close(named, features)


@torch.no_grad()
def test_who_decides():
    """`task_ids` first, then the selector, then the current task; in training the selector has no say."""
    model, batch = adapted(), mixed_batch()
    model.set_task("c")
    current = model(**batch).logits_per_image
    text = model.get_text_features(batch["input_ids"]).pooler_output
    model.attach_selector(selector_for(model, PatchTokens(1)))
    assert not torch.allclose(model(**batch).logits_per_image, current, atol=1e-3)
    explicit = torch.full((11,), 2)
    torch.testing.assert_close(model(**batch, task_ids=explicit).logits_per_image, current)
    assert torch.equal(model.get_text_features(batch["input_ids"]).pooler_output, text), (
        "no image, nothing to choose by"
    )
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch).logits_per_image, tiny_clip()(**batch).logits_per_image)

    model.train()
    model.reset_expert_usage()
    model(**batch)
    for counts in model.expert_usage().values():
        assert counts.sum() > 0, "all samples trained the current task"
    model.eval()
    model.attach_selector(None)
    assert torch.equal(model(**batch).logits_per_image, current)
    with pytest.raises(RuntimeError, match="No selector is attached"):
        model.select_tasks(batch["pixel_values"])


@torch.no_grad()
def test_vision_tower_alone():
    torch.manual_seed(0)
    base = CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()
    model = adapted(base)
    model.attach_selector(selector_for(model, PatchTokens(2)))
    pixels = mixed_batch()["pixel_values"]
    ids, _ = model.select_tasks(pixels)
    assert set(ids.tolist()) == {-1, 0, 1, 2}
    for call in (lambda **kw: model(pixels, **kw), lambda **kw: model(pixel_values=pixels, **kw)):
        torch.testing.assert_close(call().pooler_output, call(task_ids=ids).pooler_output)
    with pytest.raises(TypeError, match="no projected image features: select by `PatchTokens"):
        model.frozen_features(ImageFeatures(), pixels)
    with pytest.raises(ValueError, match="depth=3, but the vision tower has 2 blocks"):
        model.frozen_features(PatchTokens(3), pixels)


def test_the_adapter_brings_it_along(tmp_path):
    tiny_clip().save_pretrained(tmp_path / "clip")
    model = adapted(type(tiny_clip()).from_pretrained(tmp_path / "clip"))
    model.attach_selector(selector_for(model, PatchTokens(1)))
    batch = mixed_batch()
    with torch.no_grad():
        expected = model(**batch).logits_per_image
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert {"selector.safetensors", "selector.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    assert load_selector(folder).tasks == ["a", "b", "c"]
    for loaded in (PeftModel.from_pretrained(tiny_clip(), folder), AutoPeftModel.from_pretrained(folder)):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**batch).logits_per_image, expected)

    save_file({**batch, "logits": expected.contiguous()}, tmp_path / "batch.safetensors")
    code = """
import sys, torch, peft_moe_merge
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel
folder = sys.argv[1]
batch = load_file(folder + "/batch.safetensors")
expected = batch.pop("logits")
model = PeftModel.from_pretrained(CLIPModel.from_pretrained(folder + "/clip"), folder + "/adapter")
with torch.no_grad():
    torch.testing.assert_close(model(**batch).logits_per_image, expected, rtol=1e-5, atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)

    with pytest.warns(UserWarning, match="saved with a task selector, which a configuration loaded by itself"):
        bare = PeftModel.from_pretrained(tiny_clip(), folder, config=PeftConfig.from_pretrained(folder))
    assert bare.task_selector is None

    # a second adapter has no selector of its own, and the files of a selector that was taken away are ignored
    model.add_adapter("other", MoELoraMergeConfig(num_experts=6, r=4, tasks=["x"]))
    model.set_adapter("other")
    assert model.task_selector is None
    model.set_adapter("default")
    assert model.task_selector.tasks == ["a", "b", "c"]
    model.attach_selector(None)
    model.save_pretrained(folder)
    assert PeftModel.from_pretrained(tiny_clip(), folder).task_selector is None


def test_selector_and_adapter_with_different_tasks(tmp_path):
    model = adapted()
    message = r"selector knows the tasks \['a', 'b'\], the adapter has \['a', 'b', 'c'\]"
    with pytest.raises(ValueError, match=message):
        model.attach_selector(selector_for(model, PatchTokens(1), tasks=("a", "b")))
    with pytest.raises(ValueError, match=r"knows the tasks \['b', 'a', 'c'\]"):
        model.attach_selector(selector_for(model, PatchTokens(1), tasks=("b", "a", "c")))

    selector = selector_for(model, PatchTokens(1))
    model.attach_selector(selector)
    model.add_task("d")  # while it trains the selector lags behind: saved and loaded, but it does not choose
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=True).eval()
    for one in (model, loaded):
        with pytest.raises(ValueError, match=r"the adapter has \['a', 'b', 'c', 'd'\]"):
            one(**tiny_batch())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.task_selector.fit("d", loaded.frozen_features(PatchTokens(1), images(3)))
    with torch.no_grad():
        assert loaded(**tiny_batch()).logits_per_image.shape == (4, 3)

    without_checksums(tmp_path)
    described = json.loads((tmp_path / "selector.json").read_text())
    (tmp_path / "selector.json").write_text(json.dumps({**described, "tasks": ["x", "b", "c"]}))
    with pytest.raises(ValueError, match=r"knows the tasks \['x', 'b', 'c'\], the adapter has \['a', 'b', 'c', 'd'\]"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)
    (tmp_path / "selector.json").unlink()
    with pytest.raises(FileNotFoundError, match="there is no selector, or half of one"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_a_baked_task_has_nothing_to_choose():
    model = adapted()
    model.attach_selector(selector_for(model, PatchTokens(1)))
    baked = model.bake_task("b")
    assert baked.task_selector is None and model.task_selector is not None
    batch = mixed_batch()
    with torch.no_grad():
        model_b = model(**batch, task_ids=torch.full((11,), 1)).logits_per_image
        torch.testing.assert_close(baked(**batch).logits_per_image, model_b)


def test_alexnet(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    pixels = images(0, count=2)
    with pytest.warns(UserWarning, match="the network is random"):
        random = AlexNetFeatures()(tiny_clip(), pixels)
    assert random.shape == (2, 256 * 13 * 13)
    network = torchvision.models.alexnet(weights=None).eval()
    save_file(network.state_dict(), tmp_path / "alexnet.safetensors")
    features = AlexNetFeatures(str(tmp_path / "alexnet.safetensors"))(tiny_clip(), pixels)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    picture = pixels * std[:, None, None] + mean[:, None, None]
    picture = torch.nn.functional.interpolate(picture, (224, 224), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network.features[:11]((picture - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(features, expected.flatten(1))
