"""Use after training without PEFT's or our own calls: transformers' pipeline, and an exported graph."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_classifier import TASKS, adapted, pictures, probabilities
from transformers import CLIPModel, CLIPProcessor, pipeline

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig
from peft_moe_merge.inference.export import export_task
from peft_moe_merge.mtil.data.mini import mini_clip_path

LABELS = ["cat", "dog", "rabbit"]


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    return CLIPProcessor.from_pretrained(mini_clip_path())


@pytest.mark.parametrize("loaded", [False, True])
def test_the_zero_shot_pipeline_runs_an_adapted_model(loaded: bool, processor: CLIPProcessor, tmp_path) -> None:
    model = adapted()
    if loaded:
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(CLIPModel.from_pretrained(mini_clip_path()), tmp_path)
    classify = pipeline(
        "zero-shot-image-classification",
        model=model.get_base_model(),  # a CLIPModel, with the experts in it
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    image = pictures(1)[0]
    told = {}
    for task in ("pets", "shapes", None):
        model.set_task(task)
        answer = classify(image, candidate_labels=LABELS, hypothesis_template="a photo of a {}.")
        told[task] = {one["label"]: one["score"] for one in answer}
        prompts = {label: [f"a photo of a {label}."] for label in LABELS}
        assert told[task] == pytest.approx(probabilities(model, processor, image, task, prompts), abs=1e-4)
    assert told["pets"] != pytest.approx(told["shapes"], abs=1e-2)
    assert told["pets"] != pytest.approx(told[None], abs=1e-2)


def test_an_exported_task_gives_equal_logits_at_any_batch_size(processor: CLIPProcessor, tmp_path) -> None:
    model = adapted()
    layers = model.get_base_model().vision_model.encoder.layers
    del layers[1:]  # tracing takes its time, and one block has everything in it
    classifier = ContinualClassifier(model, processor, TASKS)
    images = pictures(7)
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    program = export_task(classifier, "pets")
    assert not any("text_model" in name for name in program.state_dict), "the text tower is left out"
    expected = torch.tensor([list(one.probabilities.values()) for one in classifier(images, task="pets")])
    assert expected.argmax(dim=1).unique().numel() > 1
    for rows in (slice(0, 1), slice(0, 2), slice(2, 7)):
        logits = program.module()(pixels[rows])
        torch.testing.assert_close(logits.softmax(dim=-1), expected[rows], rtol=1e-5, atol=1e-5)

    # and in a process that has neither PEFT nor transformers nor this package
    torch.export.save(program, tmp_path / "pets.pt2")
    save_file({"pixels": pixels}, tmp_path / "in.safetensors")
    code = """
import sys, torch
from safetensors.torch import load_file, save_file
folder = sys.argv[1]
run = torch.export.load(folder + "/pets.pt2").module()
save_file({"logits": run(load_file(folder + "/in.safetensors")["pixels"]).contiguous()}, folder + "/out.safetensors")
assert not {"peft", "transformers", "peft_moe_merge"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    there = load_file(tmp_path / "out.safetensors")["logits"].softmax(dim=-1)
    torch.testing.assert_close(there, expected, rtol=1e-5, atol=1e-5)


def test_exporting_an_unknown_task(processor: CLIPProcessor) -> None:
    with pytest.raises(ValueError, match="Unknown task 'cars'"):
        export_task(ContinualClassifier(adapted(), processor, TASKS), "cars")


def test_photographs(real_images, real_clip) -> None:
    """With experts that add nothing yet, classifier and exported graph say what transformers' pipeline says of the CLIP."""
    clip, processor = CLIPModel.from_pretrained(real_clip), CLIPProcessor.from_pretrained(real_clip)
    folders = sorted((real_images / "caltech101" / "test").iterdir())[:6]
    photographs = [str(next(iter(sorted(folder.iterdir())))) for folder in folders]
    names = [folder.name.replace("_", " ") for folder in folders]
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    classify = pipeline("zero-shot-image-classification", model=clip, **parts)
    answers = classify(photographs, candidate_labels=names, hypothesis_template="a photo of a {}.")
    expected = [{one["label"]: one["score"] for one in answer} for answer in answers]

    model = get_peft_model(clip, MoELoraMergeConfig(num_experts=4, r=4, tasks=["caltech101"]))
    classifier = ContinualClassifier(model, processor, {"caltech101": names})
    for task in (-1, "caltech101"):
        for prediction, scores in zip(classifier(photographs, task=task), expected, strict=True):
            assert prediction.probabilities == pytest.approx(scores, abs=1e-4)
    pixels = processor(images=[Image.open(name).convert("RGB") for name in photographs], return_tensors="pt")
    told = export_task(classifier, "caltech101").module()(pixels["pixel_values"]).softmax(dim=-1)
    for row, scores in zip(told.tolist(), expected, strict=True):
        assert dict(zip(names, row, strict=True)) == pytest.approx(scores, abs=1e-4)
