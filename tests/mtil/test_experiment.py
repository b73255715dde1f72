"""One owner of all settings: checked whole before the first step, compared whole when a run goes on, told whole."""

import runpy
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import play, without_seconds, write_images
from PIL import Image

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.moe_lora_merge import TUNER_OPTIONS, MixtureSettings
from peft_moe_merge.mtil.settings import borrowed
from peft_moe_merge.mtil.stream import StreamSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"


# settings ------------------------------------------------------------------------------------------------------------


def test_options_of_the_tuner_are_the_tuners():
    own = {field.name: field for field in fields(MoELoraMergeConfig)}
    for field in fields(MethodSettings):
        if field.name in TUNER_OPTIONS:
            assert (field.default, field.metadata["help"]) == (
                own[field.name].default,
                own[field.name].metadata["help"],
            )
    assert set(TUNER_OPTIONS) <= {field.name for field in fields(MethodSettings)}
    config = MixtureSettings(merge_pair="most_similar", num_experts=7).config(["a", "b"])
    assert (config.merge_pair, config.num_experts, config.tasks) == ("most_similar", 7, ["a", "b"])
    (name, kind, field) = borrowed(MoELoraMergeConfig, ["tasks"])[0]
    assert (name, kind, field.default_factory()) == ("tasks", list[str], ["default"])
    with pytest.raises(AttributeError, match="has no field experts; there are"):
        borrowed(MoELoraMergeConfig, ["experts"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"merge_strategy": "avg"},
        {"num_experts": 0},
        {"top_k": 60},
        {"merge_every": 0},
        {"freeze_top_k": -1},
        {"router_explore": -5},
        {"router_gap": -0.5},
        {"router_stop": -1},
        {"label_smoothing": 1.5},
    ],
)
def test_values_of_methods_are_checked_when_they_are_given(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        MethodSettings(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"warmup_steps": -5},
        {"num_workers": -1},
        {"max_grad_norm": 0.0},
        {"weight_decay": -1.0},
        {"lr": [1e-3, -1e-3]},
    ],
)
def test_values_of_training_are_checked_when_they_are_given(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
        StreamSettings(**wrong)


def test_the_gate_gap_test_has_an_exploration_of_its_own(experiment):
    settings = MethodSettings(num_experts=4, r=2, router_gap=0.5, router_explore=7, merge_every=20)
    (stopping,) = METHODS["moe_lora_merge"](*experiment().build_clip(), settings).callbacks[1:]
    assert (stopping.explore, stopping.gap) == (7, 0.5)
    assert MethodSettings(merge_every=20).router_explore == 100


def test_the_command_line_offers_choices(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["--methods", "finetune", "moe_lora_merge", "--merge_strategy", "avg"], "'average', 'aligned'"),
        (["--methods", "finetun"], "'finetune'"),
        (["--selectors", "oracle"], "'gaussian'"),
        (["--order", "III"], "'random'"),
        (["--mixed_precision", "fp8"], "'bf16'"),
    ):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        told_by_argparse = capsys.readouterr().err
        assert stopped.value.code == 2 and "invalid choice" in told_by_argparse and told in told_by_argparse
    assert not list(tmp_path.iterdir())


# before the first step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "methods", "error", "message"),
    [
        ({"methods": {"reference": "no/such/folder"}}, ("finetune", "zscl"), FileNotFoundError, "No reference images"),
        (
            {"methods": {"exemplars": 3}},
            ("finetune", "icarl"),
            ValueError,
            "exemplars=3 .* 4 classes up to task 'tools'",
        ),
        ({"data": {"few_shot": 5}}, ("finetune",), ValueError, "has 4 images of .*; few_shot=5 is more"),
        ({"data": {"tasks": ["birds", "cars"]}}, ("finetune",), FileNotFoundError, "No task 'cars'"),
        ({"model": "no/such/clip"}, ("finetune",), OSError, "no/such/clip"),
        ({"training": {"lr": [1e-3] * 3}}, ("finetune",), ValueError, "3 learning rates for 2 tasks"),
        (
            {"selection": {"selectors": ["gaussian"], "selector_depth": 9}},
            ("finetune", "moe_lora_merge"),
            ValueError,
            "depth=9, but the vision tower has 3 blocks",
        ),
        (
            {"selection": {"selectors": ["gaussian"], "selector_features": "alexnet", "alexnet_weights": "no/file"}},
            ("finetune", "moe_lora_merge"),
            OSError,
            "no/file",
        ),
        ({}, ("finetune", "gradient_descent"), ValueError, r"Unknown methods \['gradient_descent'\]"),
        ({}, ("finetune", "finetune"), ValueError, "`methods` must name at least one, and none twice"),
    ],
)
def test_what_would_stop_a_run_later_stops_it_at_once(experiment, tmp_path, change, methods, error, message):
    with pytest.raises(error, match=message):
        play(experiment(**change), tmp_path, methods)
    assert not list(tmp_path.iterdir())


def test_what_the_refusals_advise_goes_through(experiment, tmp_path):
    for change in (
        {"methods": {"reference": "mini"}},
        {"methods": {"exemplars": 4}},
        {"data": {"few_shot": 4}},
        {"data": {"tasks": ["tools", "birds"]}},
        {"training": {"lr": [1e-3]}},
        {"training": {"lr": [1e-3, 1e-4]}},
        {"selection": {"selectors": ["gaussian"], "selector_depth": 3}},
    ):
        experiment(**change).check(list(METHODS), [0, 1], tmp_path)
    assert not list(tmp_path.iterdir())


def test_seeds_named_twice(experiment, tmp_path):
    with pytest.raises(ValueError, match=r"`seeds` must .* none twice; got \[1, 1\]"):
        experiment().check(["zero_shot"], [1, 1], tmp_path)


def test_a_run_of_the_last_method_stops_the_first(experiment, tmp_path):
    play(experiment(), tmp_path, ("zero_shot",), seeds=(0,))
    with pytest.raises(FileExistsError, match="zero_shot/seed_0' holds a run already.*--resume"):
        play(experiment(), tmp_path, ("finetune", "zero_shot"), seeds=(0,))
    assert not (tmp_path / "finetune").exists()
    both = play(experiment(), tmp_path, ("finetune", "zero_shot"), resume=True)  # as advised
    assert set(both["methods"]) == {"finetune", "zero_shot"}


# going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"few_shot": 3}}, "few_shot was None, is 3"),
        ({"data": {"order": "random"}}, "order was 'I', is 'random'"),
        ({"training": {"steps": 3}}, "steps was 2, is 3"),
        ({"training": {"num_workers": 2}}, "num_workers was 0, is 2"),  # crops are drawn where images are decoded
        ({"training": {"lr": [1e-2]}}, r"lr was \[0.001, 0.001\], is \[0.01\]"),
        ({"methods": {"full_lr": 1e-4}}, "full_lr was 0.0005, is 0.0001"),
        ({"selection": {"selectors": ["gaussian"]}}, r"selectors was \[\], is \['gaussian'\]"),
    ],
)
def test_resume_refuses_other_settings(experiment, tmp_path, change, message):
    play(experiment(), tmp_path, stop_after=1)
    before = (tmp_path / "zero_shot/seed_0/after_1/progress.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        play(experiment(**change), tmp_path, resume=True)
    assert (tmp_path / "zero_shot/seed_0/after_1/progress.json").read_bytes() == before
    play(experiment(), tmp_path, resume=True)  # as advised: with those of the run
    with pytest.raises(ValueError, match=message):  # the table, for a seed that has no run yet
        play(experiment(**change), tmp_path, seeds=(1,))
    play(experiment(**change), tmp_path / "other", seeds=(1,))  # as advised: another output folder


def test_resume_refuses_other_data(experiment, tmp_path):
    suite = write_images(tmp_path / "images")
    folder = tmp_path / "run"
    play(experiment(data={"suite": str(suite)}), folder, stop_after=1)
    content = experiment(data={"suite": str(suite)}).fingerprint["data_content"]

    def refused():
        changed = experiment(data={"suite": str(suite)})
        with pytest.raises(
            ValueError, match=f"data_content was '{content}', is '{changed.fingerprint['data_content']}'"
        ):
            play(changed, folder, resume=True)

    image = suite / "tools" / "test" / "axe" / "3.png"
    original = image.read_bytes()
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    refused()
    image.write_bytes(original)
    shutil.copy(image, image.with_name("4.png"))
    refused()
    image.with_name("4.png").unlink()
    (suite / "tools/train/axe").rename(suite / "tools/train/ax")
    (suite / "tools/test/axe").rename(suite / "tools/test/ax")
    refused()
    (suite / "tools/train/ax").rename(suite / "tools/train/axe")
    (suite / "tools/test/ax").rename(suite / "tools/test/axe")
    play(experiment(data={"suite": str(suite)}), folder, resume=True)


def test_resume_refuses_another_model_in_the_same_folder(experiment, clip_folder, tmp_path):
    model = shutil.copytree(clip_folder, tmp_path / "clip")
    play(experiment(model=model), tmp_path / "run", stop_after=1)
    clip, processor = experiment(model=model).build_clip()
    with torch.no_grad():
        next(clip.vision_model.parameters())[0] += 1e-3
    clip.save_pretrained(model)
    with pytest.raises(ValueError, match="model_content was '.*', is '"):
        play(experiment(model=model), tmp_path / "run", resume=True)
    shutil.copy(clip_folder / "model.safetensors", model)
    processor.image_processor.image_mean = [0.1, 0.1, 0.1]
    processor.save_pretrained(model)
    with pytest.raises(ValueError, match="model_content was '.*', is '"):
        play(experiment(model=model), tmp_path / "run", resume=True)


def test_resume_refuses_another_reference_in_the_same_folder(experiment, images, tmp_path):
    reference = shutil.copytree(images / "birds" / "train", tmp_path / "reference")
    zscl = {"methods": {"reference": str(reference), "extra_batch_size": 2}}
    play(experiment(**zscl), tmp_path / "run", ("zscl",), stop_after=1)
    from peft_moe_merge.mtil.data.reference import load_reference

    load_reference.cache_clear()  # as in another process
    Image.new("RGB", (32, 32)).save(reference / "hen" / "0.png")
    with pytest.raises(ValueError, match="reference_content was '.*', is '"):
        play(experiment(**zscl), tmp_path / "run", ("zscl",), resume=True)


def test_what_makes_no_difference_may_differ(experiment, tmp_path):
    straight = play(experiment(), tmp_path / "straight", ("finetune",))
    play(experiment(), tmp_path / "before", ("finetune",), stop_after=1)
    (tmp_path / "before").rename(tmp_path / "moved")
    changed = experiment(training={"eval_batch_size": 3})
    resumed = play(changed, tmp_path / "moved", ("finetune",), resume=True)
    assert without_seconds(resumed)["methods"] == without_seconds(straight)["methods"]


# few images ----------------------------------------------------------------------------------------------------------


def test_each_seed_has_its_own_few_images(experiment, images, tmp_path):
    few = {"data": {"few_shot": 2}}
    drawn = {seed: experiment(**few).stream(seed).tasks for seed in (0, 1)}
    for seed, tasks in drawn.items():
        for task, alone in zip(tasks, load_suite(str(images), few_shot=2, seed=seed, progress=False), strict=True):
            assert task.content == alone.content and np.bincount(task.train["label"]).tolist() == [2, 2]
    assert [a.content != b.content for a, b in zip(drawn[0], drawn[1], strict=True)] == [True, True]

    together = play(experiment(**few), tmp_path / "together", ("finetune",), seeds=(0, 1))
    play(experiment(**few), tmp_path / "one_by_one", ("finetune",), seeds=(0,))
    later = play(experiment(**few), tmp_path / "one_by_one", ("finetune",), seeds=(1,))
    assert without_seconds(later) == without_seconds(together)
    losses = [run["losses"] for run in together["methods"]["finetune"]]
    assert losses[0] != losses[1]


def test_a_random_order_is_that_of_all_seeds(experiment, tmp_path):
    orders = {order_seed: experiment(data={"order": "random", "order_seed": order_seed}) for order_seed in range(6)}
    names = {order_seed: [task.name for task in one.tasks] for order_seed, one in orders.items()}
    assert len(set(map(tuple, names.values()))) == 2
    results = play(orders[0], tmp_path, seeds=(0,))
    assert results["tasks"] == names[0]
    assert len(play(orders[0], tmp_path, seeds=(1,))["methods"]["zero_shot"]) == 2
    other = next(seed for seed in names if names[seed] != names[0])
    with pytest.raises(ValueError, match="tasks was .*, is "):
        play(orders[other], tmp_path, seeds=(2,))
