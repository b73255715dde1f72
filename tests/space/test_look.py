"""What the page of examples/space tells of an image, without the page."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from drawing import gates_figure, short_name
from embedded import embedded_classifier, newest_adapter, sample_images
from huggingface_hub import SpaceCard
from look import look
from packaging.requirements import Requirement
from peft import get_peft_model
from space.tiny_adapter import LEARNT
from transformers import CLIPModel

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path

SPACE = Path(__file__).parents[2] / "examples" / "space"


def images(name, count=6):
    return load_task(name, "test").shuffle(seed=1)[:count]["image"]


def test_answers_are_the_classifiers(classifier):
    for name in LEARNT:
        for image in images(name):
            seen = look(classifier, image)
            assert seen.answer == classifier(image)
            if seen.answer.task is not None:
                of_task = classifier.tasks[seen.answer.task]
                assert seen.plain == classifier(image, task=-1, candidates=of_task)
                assert list(seen.plain.probabilities) == list(seen.answer.probabilities), "the same classes"
            named = look(classifier, image, ["a house", "a boat"], task="digits")
            assert named.answer == classifier(image, task="digits", candidates=["a house", "a boat"])
            assert named.plain == classifier(image, task=-1, candidates=["a house", "a boat"])
            assert named.reasons == ("The task was given, so nothing was chosen.",) and named.scores == ()
            assert seen.answer_ms > 0 and seen.plain_ms > 0


def test_gates_are_those_of_the_images_own_call(classifier):
    (image,) = images("digits", 1)
    seen = look(classifier, image, task="digits")
    model = classifier.model
    pixels = classifier.processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad(), model.recorded_gates() as gates:
        model.get_image_features(pixel_values=pixels, task_ids=torch.tensor([1]))
    assert seen.gates == {block: passes[0][0].tolist() for block, passes in gates.items()}
    assert len(seen.gates) == 4 * 6, "four layers of the image tower, six modules each, none of the text tower"
    for block, weights in seen.gates.items():
        own = model.experts_of_task("digits")[block]
        assert sum(weights) == pytest.approx(1.0) and {i for i, weight in enumerate(weights) if weight} <= set(own)
    assert seen.owners == ("shapes", "shapes", "digits", "digits")
    assert look(classifier, image, task=-1).gates == {}, "no expert takes part in plain CLIP"
    # class names that are new are encoded in the same call, and are not the image's
    assert look(classifier, image, ["one", "some other name"], task="digits").gates == seen.gates


def test_reasons(classifier):
    (image,) = images("digits", 1)
    seen = look(classifier, image, list(TASKS["digits"].classes))
    assert seen.answer.task == "digits" and seen.scores == ()
    assert seen.reasons[0] == "The class names are evidence: they leave digits."
    none = look(classifier, image, ["harbour", "meadow", "railway"])
    assert none.answer.task is None and none.answer == none.plain and none.gates == {}
    assert none.reasons == ("The class names are those of no task, so CLIP without experts answers.",)
    both = look(classifier, image, [*TASKS["digits"].classes, *TASKS["shapes"].classes])
    assert both.reasons[0] == "The class names are evidence: they leave shapes or digits."
    assert both.reasons[1] == f"The selector finds {both.answer.task} most likely."
    some = look(classifier, image, [*TASKS["digits"].classes, "harbour"])
    assert some.reasons[0] == "The class names are evidence: they leave digits or no task."
    assert [score.asked for score in some.scores if score.task == "shapes"] == [False]


def test_the_selectors_scores_are_shown(classifier):
    outcomes = set()
    for name in (*LEARNT, "food", "textures", "aerial"):
        for image in images(name):
            seen = look(classifier, image)
            pixels = classifier.processor(images=image, return_tensors="pt")["pixel_values"]
            ids, scores = classifier.model.select_tasks(pixels)
            by_name = dict(zip(LEARNT, scores[0].tolist(), strict=True))
            assert {one.task: one.score for one in seen.scores} == pytest.approx(by_name)
            assert [one.score for one in seen.scores] == sorted(by_name.values(), reverse=True)
            best = seen.scores[0]
            chosen = best.task if best.score >= best.bar else None
            assert seen.answer.task == chosen == (None if ids[0] < 0 else LEARNT[ids[0]])
            (reason,) = seen.reasons
            assert reason.startswith(f"The selector finds {best.task} most likely")
            assert ("above its bar" in reason, "none of them" in reason) == (chosen is not None, chosen is None)
            outcomes.add(chosen)
    assert outcomes == {*LEARNT, None}, "all kinds of outcome were seen"


def test_visitors_at_once_get_what_each_alone_gets(adapter):
    """With a fresh classifier, so that nothing is encoded yet when all of them begin."""
    asked = [
        ("digits", None, None),
        ("shapes", None, None),
        ("digits", ["one", "a tree"], "digits"),
        ("shapes", ["circle", "a cloud"], None),
        ("digits", ["a tree", "a cloud"], -1),
        ("shapes", None, "digits"),
    ]
    alone = ContinualClassifier.from_pretrained(adapter)
    expected = [look(alone, images(name)[0], names, task) for name, names, task in asked]
    shared, barrier = ContinualClassifier.from_pretrained(adapter), Barrier(len(asked))

    def visit(question):
        name, names, task = question
        barrier.wait()
        return [look(shared, images(name)[0], names, task) for _ in range(3)]

    with ThreadPoolExecutor(len(asked)) as threads:
        for seen, wanted in zip(threads.map(visit, asked), expected, strict=True):
            for one in seen:
                assert (one.answer.label, one.answer.task) == (wanted.answer.label, wanted.answer.task)
                assert one.answer.probabilities == pytest.approx(wanted.answer.probabilities, abs=1e-5)
                assert one.plain.probabilities == pytest.approx(wanted.plain.probabilities, abs=1e-5)
                assert one.reasons == wanted.reasons and one.gates.keys() == wanted.gates.keys()
                for block, weights in one.gates.items():
                    assert weights == pytest.approx(wanted.gates[block], abs=1e-5)


def test_the_heat_map_shows_the_weights():
    gates = {
        "vision_model.encoder.layers.0.mlp": [0.25, 0.0, 0.75],
        "vision_model.encoder.layers.11.self_attn.q_proj": [1.0],
    }
    figure = gates_figure(gates)
    axes = figure.axes[0]
    shown = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
    np.testing.assert_array_equal(shown, [[0.25, 0.0, 0.75], [1.0, np.nan, np.nan]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0 mlp", "11 q_proj"]
    (above,) = gates_figure(gates, ["a", "a", "b"]).axes[0].child_axes
    assert [(one.get_text(), one.get_position()[0]) for one in above.get_xticklabels()] == [("a", 0.5), ("b", 2.0)]
    assert axes.images[0].get_clim() == (0, 1), "one scale for all images"
    assert short_name("fc1") == "fc1"


# --------------------------------------------------------------------------------------- what `make demo` leaves behind


def test_a_checkpoint_of_the_embedded_benchmark_gets_classes_and_a_selector(adapter, tmp_path):
    bare = ContinualClassifier.from_pretrained(adapter).model
    bare.attach_selector(None)  # a stream's checkpoint has none
    for position, (method, seed, tasks) in enumerate(
        (("moe_lora_merge", 1, 2), ("moe_lora_pool", 0, 2), ("zero_shot", 0, 2))
    ):
        checkpoint = tmp_path / method / f"seed_{seed}" / f"after_{tasks}"
        checkpoint.mkdir(parents=True)
        if method != "zero_shot":
            bare.save_pretrained(checkpoint)
        (checkpoint / "progress.json").write_text("{}")
        seconds = 1_000_000_000 + 10 * position
        os.utime(checkpoint / "progress.json", (seconds, seconds))
    newest = newest_adapter(tmp_path)
    assert newest == tmp_path / "moe_lora_pool" / "seed_0" / "after_2", "the newest one with experts"
    loaded, trained = embedded_classifier(newest), ContinualClassifier.from_pretrained(adapter)
    for image in (*images("digits", 3), *images("food", 3)):
        assert loaded(image).probabilities == pytest.approx(trained(image).probabilities, abs=1e-6)
        assert look(loaded, image).reasons == look(trained, image).reasons
    assert list(sample_images(["digits", "food"])) == ["digits", "food"]


def test_a_selector_that_a_checkpoint_brings_has_a_say_in_the_class(adapter):
    """As `moe_lora_fused` leaves it."""
    loaded = embedded_classifier(adapter)
    fused = ContinualClassifier.from_pretrained(adapter, fuse=True)
    (image,) = images("digits", 1)
    seen = look(loaded, image)
    assert seen.answer == fused(image) and seen.answer != ContinualClassifier.from_pretrained(adapter)(image)
    assert seen.reasons[-1] == "Among its classes the selector had a say, too."


def test_without_an_adapter_the_way_out_is_said(adapter, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`make demo` trains one; or name one of the Hub by `--adapter user/name`"
    ):
        newest_adapter(tmp_path)
    shutil.copytree(adapter, tmp_path / "foreign")
    config = tmp_path / "foreign" / "adapter_config.json"
    text = re.sub(r'"checksums": \{[^}]*\},?', "", config.read_text()).replace('"digits"', '"my_pets"')
    config.write_text(text)
    with pytest.raises(ValueError, match=r"has learnt \['my_pets'\], which are not of the embedded benchmark"):
        embedded_classifier(tmp_path / "foreign")


def test_the_space_is_what_the_hub_takes():
    card = SpaceCard.load(SPACE / "README.md")
    told = card.data.to_dict()
    assert told["sdk"] == "gradio" and (SPACE / told["app_file"]).is_file() and told["license"] == "apache-2.0"
    assert int(told["sdk_version"].split(".")[0]) >= 6 and len(told["short_description"]) <= 60
    assert {told["colorFrom"], told["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    lines = [line for line in (SPACE / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert [Requirement(line).name for line in lines] == ["peft-moe-merge"]


def test_shared_experts_have_no_owner(classifier):
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=2, tasks=list(LEARNT))
    model = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config)
    shared = ContinualClassifier(model, classifier.processor, classifier.tasks)
    seen = look(shared, images("digits", 1)[0], task="digits")
    assert seen.owners == () and len(seen.gates) == 4
    assert all(sum(map(bool, weights)) == 2 for weights in seen.gates.values()), "the two chosen of four"
