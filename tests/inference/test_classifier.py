"""The classifier against PEFT's own calls, one image, one class and one task at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomize, tiny_clip
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig, TaskClasses
from peft_moe_merge.inference.classifier import write_classes
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.selection import GaussianSelector

TASKS = {
    "pets": TaskClasses(("cat", "dog", "rabbit"), ("a photo of a {}.", "a drawing of the {}.")),
    "shapes": ["circle", "cat"],
}


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 32, 3), dtype=np.uint8)) for _ in range(count)]


def adapted() -> PeftModel:
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=list(TASKS))
    model = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config)
    randomize(model)
    return model.eval()


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(mini_clip_path())


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted()


@pytest.fixture
def classifier(model: PeftModel, processor: CLIPProcessor) -> ContinualClassifier:
    return ContinualClassifier(model, processor, TASKS, batch_size=3)


@torch.no_grad()
def probabilities(
    model: PeftModel, processor: CLIPProcessor, image: Image.Image, task: str | None, prompts: dict[str, list[str]]
) -> dict[str, float]:
    """The reference: `prompts` are those of each class, `task` None is CLIP without experts."""
    model.set_task(task)
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    image_P = F.normalize(model.get_image_features(pixels).pooler_output[0], dim=-1)
    logits = []
    for of_class in prompts.values():
        texts = [
            F.normalize(
                model.get_text_features(processor.tokenizer(p, return_tensors="pt").input_ids).pooler_output[0], dim=0
            )
            for p in of_class
        ]
        logits.append(model.get_base_model().logit_scale.exp() * image_P @ F.normalize(sum(texts), dim=0))
    return dict(zip(prompts, torch.stack(logits).softmax(dim=0).tolist(), strict=True))


def prompts_of(task: str) -> dict[str, list[str]]:
    if task == "pets":
        return {name: [f"a photo of a {name}.", f"a drawing of the {name}."] for name in ("cat", "dog", "rabbit")}
    return {name: [f"a photo of a {name}."] for name in ("circle", "cat")}


def test_mixed_tasks_in_one_call(classifier, model, processor) -> None:
    images = pictures(7)
    tasks = ["pets", 1, "shapes", -1, 0, "pets", -1]
    predictions = classifier(images, task=tasks)
    everything = {**prompts_of("pets"), "circle": ["a photo of a circle."]}  # "cat" by the templates of the first task
    for image, task, prediction in zip(
        images, ["pets", "shapes", "shapes", None, "pets", "pets", None], predictions, strict=True
    ):
        prompts = everything if task is None else prompts_of(task)
        expected = probabilities(model, processor, image, task, prompts)
        assert prediction.task == task
        assert prediction.probabilities == pytest.approx(expected, abs=1e-4)
        assert prediction.label == max(expected, key=expected.get)
        assert prediction.score == max(prediction.probabilities.values())
    assert classifier.model.training is False


def test_one_image_a_path_and_a_list_alike(classifier, tmp_path) -> None:
    image = pictures(1)[0]
    image.save(tmp_path / "a.png")
    one = classifier(image, task="pets")
    assert classifier(tmp_path / "a.png", task="pets") == one
    assert classifier([str(tmp_path / "a.png")], task="pets") == [one]
    grey = image.convert("L").convert("P")
    assert classifier(grey, task=0).probabilities.keys() == one.probabilities.keys()
    assert classifier([], task="pets") == []


def test_texts_are_encoded_once(classifier, monkeypatch) -> None:
    calls = []
    encode = classifier.model.get_text_features

    def counted(**arguments):
        calls.append(arguments["task_ids"].unique().item())
        return encode(**arguments)

    monkeypatch.setattr(classifier.model, "get_text_features", counted)
    classifier(pictures(7), task=["pets", "shapes"] * 3 + ["pets"])
    classifier(pictures(7), task="pets")
    assert sorted(calls) == [0, 1]


def test_an_attached_selector_chooses_for_each_image(processor, tmp_path) -> None:
    model = adapted()
    generator = np.random.default_rng(1)

    def of_task(brightness: int, count: int) -> list[Image.Image]:
        noise = generator.integers(0, 40, (count, 40, 32, 3))
        return [Image.fromarray((brightness + pixels).astype(np.uint8)) for pixels in noise]

    selector = GaussianSelector(reject_rate=0.05)
    for task, brightness in (("pets", 0), ("shapes", 210)):
        pixels = processor(images=of_task(brightness, 300), return_tensors="pt")["pixel_values"]
        selector.fit(task, model.frozen_features(selector.source, pixels))
    model.attach_selector(selector)
    classifier = ContinualClassifier(model, processor, TASKS, open_classes=["tree", "car"], batch_size=4)
    images = [*of_task(0, 2), *pictures(1), *of_task(210, 2), *pictures(1), *of_task(0, 1)]
    predictions = classifier(images)
    expected = ["pets", "pets", None, "shapes", "shapes", None, "pets"]
    assert [prediction.task for prediction in predictions] == expected
    for one, other in zip(predictions, classifier(images, task=[0, 0, -1, 1, 1, -1, 0]), strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
    assert list(predictions[2].probabilities) == ["tree", "car"]

    classifier.save_pretrained(tmp_path)
    loaded = ContinualClassifier.from_pretrained(tmp_path)
    assert [prediction.task for prediction in loaded(images)] == expected


def test_save_and_load(classifier, tmp_path) -> None:
    classifier.open_classes = TaskClasses(("tree", "car"))
    classifier.save_pretrained(tmp_path)
    loaded = ContinualClassifier.from_pretrained(tmp_path)  # the config names the CLIP
    images = pictures(4)
    for one, other in zip(classifier(images, task=[0, 1, -1, 0]), loaded(images, task=[0, 1, -1, 0]), strict=True):
        assert (one.label, one.task) == (other.label, other.task)
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_bad_input(classifier, model, processor, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"tasks \['pets', 'shapes'\], but classes are given for \['pets'\]"):
        ContinualClassifier(model, processor, {"pets": ["cat"]})
    lora = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(TypeError, match="got one of LoraConfig"):
        ContinualClassifier(lora, processor, TASKS)
    with pytest.raises(ValueError, match="`class_names` must be a list .* got 'cat'"):
        ContinualClassifier(model, processor, {"pets": "cat", "shapes": ["circle"]})
    with pytest.raises(ValueError, match=r"templates.*got \('a photo',\)"):
        TaskClasses(("cat",), ("a photo",))
    with pytest.raises(ValueError, match=r"Unknown tasks \['cars'\]"):
        classifier(pictures(2), task=["pets", "cars"])
    with pytest.raises(ValueError, match=r"Unknown tasks \[2\]"):
        classifier(pictures(1), task=2)
    with pytest.raises(ValueError, match="1 tasks for 2 images"):
        classifier(pictures(2), task=["pets"])
    with pytest.raises(ValueError, match=r"Which task are these images from\?.*selector"):
        classifier(pictures(1))
    with pytest.raises(ValueError, match="nowhere.png"):
        classifier("nowhere.png", task="pets")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OSError, match="text.png"):
        classifier(tmp_path / "text.png", task="pets")
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="classifier.json"):
        ContinualClassifier.from_pretrained(tmp_path)
    for damaged in ('{"tasks": {', '{"tasks": {}}', '{"tasks": {"pets": {"names": []}}, "open_classes": null}', "[]"):
        (tmp_path / "classifier.json").write_text(damaged)
        with pytest.raises(ValueError, match="classifier.json in .* is damaged"):
            ContinualClassifier.from_pretrained(tmp_path)
    get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=4, r=4)).save_pretrained(tmp_path)
    classifier.processor.save_pretrained(tmp_path)
    write_classes(tmp_path, {"default": TaskClasses(("cat",))})
    with pytest.raises(ValueError, match="does not say which CLIP it is for"):
        ContinualClassifier.from_pretrained(tmp_path)
