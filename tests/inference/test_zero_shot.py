"""Class names as features, against one prompt at a time; accuracies, against counting by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from peft import get_peft_model

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.inference.zero_shot import accuracy, class_features, prompts_of
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path

CLASSES = ("cat", "a rather long name of a dog", "sea horse", "8")
TEMPLATES = ("a photo of a {}.", "{}", "a blurry photo of the small {}, seen from above.")


@pytest.fixture(scope="module")
def clip():
    return load_clip(mini_clip_path())


@torch.no_grad()
def one_by_one(model, tokenizer, prompts, **arguments):
    """Without padding: what each class comes to."""
    classes = []
    for of_class in prompts:
        singles = [tokenizer([prompt], return_tensors="pt")["input_ids"] for prompt in of_class]
        features = torch.cat([model.get_text_features(ids, **arguments).pooler_output for ids in singles])
        classes.append(F.normalize(F.normalize(features, dim=-1).mean(dim=0), dim=-1))
    return torch.stack(classes)


def test_prompts():
    assert prompts_of(["cat", "dog"], ["a {}.", "{}s"]) == [["a cat.", "cats"], ["a dog.", "dogs"]]


@pytest.mark.parametrize("batch_size", [1, 5, 512])
def test_against_one_prompt_at_a_time(clip, monkeypatch, batch_size):
    model, processor = clip
    prompts = prompts_of(CLASSES, TEMPLATES)
    expected, encode, sizes = one_by_one(model, processor.tokenizer, prompts), model.get_text_features, []

    def counted(**tokens):
        sizes.append(len(tokens["input_ids"]))
        return encode(**tokens)

    monkeypatch.setattr(model, "get_text_features", counted)
    torch.testing.assert_close(
        class_features(model, processor.tokenizer, prompts, batch_size=batch_size), expected, atol=1e-5, rtol=1e-5
    )
    assert max(sizes) <= batch_size and len(sizes) == math.ceil(12 / batch_size)


def test_classes_with_different_numbers_of_prompts(clip):
    model, processor = clip
    prompts = [["a cat", "the cat"], ["dog"], ["one", "two", "three"]]
    torch.testing.assert_close(
        class_features(model, processor.tokenizer, prompts),
        one_by_one(model, processor.tokenizer, prompts),
        atol=1e-5,
        rtol=1e-5,
    )
    for nothing in ([], [["a cat"], []]):
        with pytest.raises(ValueError, match="at least one prompt"):
            class_features(model, processor.tokenizer, nothing)


def test_by_the_routers_of_a_task():
    clip, processor = load_clip(mini_clip_path())
    model = get_peft_model(clip, MoELoraMergeConfig(num_experts=4, r=4, tasks=["a", "b"])).eval()
    randomize(model)
    prompts = prompts_of(CLASSES, TEMPLATES)
    model.set_task("a")
    features = [class_features(model, processor.tokenizer, prompts, task_id=task) for task in (0, 1, -1)]
    for task, of_task in zip(("a", "b", None), features, strict=True):
        model.set_task(task)
        torch.testing.assert_close(
            of_task, one_by_one(model, processor.tokenizer, prompts), atol=1e-4, rtol=1e-4, msg=str(task)
        )
    assert not torch.allclose(features[0], features[1]) and not torch.allclose(features[0], features[2])


def test_accuracy_counts_images():
    generator = torch.Generator().manual_seed(0)
    classes_CP = F.normalize(torch.randn(5, 8, generator=generator), dim=-1)
    pixels, labels = torch.randn(23, 8, generator=generator), torch.randint(5, (23,), generator=generator)
    right = sum(
        int(torch.stack([row @ c for c in classes_CP]).argmax()) == int(label)
        for row, label in zip(pixels, labels, strict=True)
    )
    assert 0 < right < 23
    pairs = [(pixels[i : i + 10], labels[i : i + 10]) for i in range(0, 23, 10)]
    named = [{"pixel_values": images, "labels": of_images} for images, of_images in pairs]
    for batches in (pairs, named):
        assert accuracy(lambda images: images @ classes_CP.T, batches) == pytest.approx(100 * right / 23)
    # what a gather drops counts neither as right nor as seen
    first = sum(
        int((row @ classes_CP.T).argmax()) == int(label) for row, label in zip(pixels[:10], labels[:10], strict=True)
    )
    kept = accuracy(lambda images: images @ classes_CP.T, pairs[:1], gather=lambda hits_B: hits_B[:10])
    assert kept == pytest.approx(10 * first)
    with pytest.raises(ValueError, match="no images"):
        accuracy(lambda images: images, [])
