"""The comparison of merges: corruptions, splits, and a whole small study through files, stopped and resumed."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import TensorDataset
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.model_merging import protocol, study
from peft_moe_merge.mtil.model_merging.corruptions import CORRUPTIONS, corrupt
from peft_moe_merge.mtil.model_merging.finetune import accuracy, finetune
from peft_moe_merge.mtil.model_merging.images import load_images
from peft_moe_merge.mtil.model_merging.report import (
    accuracy_rows,
    average,
    best_static,
    difference_rows,
    print_report,
    robustness_rows,
    write_report,
)


@pytest.fixture(scope="module")
def tasks():
    return load_digit_tasks()[:2]


def build_clip():
    tasks = load_digit_tasks()
    return small_clip([prompt for task in tasks for t in task.templates for prompt in task.prompts(t)], image_size=16)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions_change_images_but_not_beyond_recognition(name):
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(3, 3, 4, 4, generator=g), size=(36, 36), mode="bicubic").clamp(
        0, 1
    )
    processor = CLIPImageProcessor()
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    images = TensorDataset((smooth - mean) / std, torch.arange(3))
    corrupted, labels = corrupt(images, name, processor, seed=1).tensors
    assert torch.equal(labels, torch.arange(3)) and corrupted.shape == smooth.shape
    pixels = corrupted * std + mean
    assert pixels.min() > -1e-4 and pixels.max() < 1 + 1e-4
    assert 0.005 < (pixels - smooth).abs().mean() < 0.25
    assert torch.equal(corrupt(images, name, processor, seed=1).tensors[0], corrupted)
    differs = not torch.equal(corrupt(images, name, processor, seed=2).tensors[0], corrupted)
    assert differs == (name in ("impulse", "gauss"))


def test_splits_share_no_image_and_heads_are_the_text_features(tasks):
    clip, processor = build_clip()
    images = load_images(tasks[0], clip, processor, seed=3)
    assert len(images.finetune) + len(images.adapt) == len(tasks[0].train) and len(images.test) == len(tasks[0].test)
    rows = [tuple(pixels.flatten().tolist()) for split in (images.finetune, images.adapt) for pixels, _ in split]
    everything = processor.image_processor(
        [image.convert("RGB") for image in tasks[0].train["image"]], return_tensors="pt"
    )["pixel_values"]
    assert sorted(rows) == sorted(tuple(pixels.flatten().tolist()) for pixels in everything)
    torch.testing.assert_close(images.head_CD.norm(dim=1), torch.ones(len(tasks[0].class_names)))
    assert images.finetune.tensors[0].shape[1:] == (3, 16, 16) and isinstance(tasks[0].train[0]["image"], Image.Image)


def test_finetuning_learns_and_leaves_the_text_tower_alone(tasks):
    clip, processor = build_clip()
    images = load_images(tasks[0], clip, processor)
    before = accuracy(clip, images.test, images.head_CD)
    tuned = finetune(clip, [images], Accelerator(cpu=True), steps=60, lr=1e-3, batch_size=32, seed=0)
    assert accuracy(tuned, images.test, images.head_CD) > before + 30
    for (name, new), old in zip(tuned.named_parameters(), clip.parameters(), strict=True):
        assert name.startswith("vision_model.") or torch.equal(new, old)


def test_a_study_that_is_stopped_and_resumed_equals_one_that_is_not(tasks, tmp_path, monkeypatch, capsys):
    settings = study.StudySettings(finetune_steps=4, finetune_lr=1e-3, adapt_steps=2, batch_size=8, adapt_batch_size=4)
    methods = ["pretrained", "individual", "multitask", "ties", "adamerging_mi", "wemoe_mi", "smile"]
    held_out = load_digit_tasks()[2:]
    accelerator = Accelerator(cpu=True)
    names = [task.name for task in tasks]
    everything = study.Study(tasks, held_out, build_clip, settings, accelerator, {"1": names[:1]})
    options = {
        "methods": methods,
        "group_methods": ["average", "wemoe_labels"],
        "robust_methods": ["wemoe_mi", "individual"],
        "corruptions": ["gauss"],
    }
    whole = everything.run(tmp_path / "whole", **options)

    written, write = [], study.write_results

    def stopping(file, result):
        write(file, result)
        written.append(len(result["rows"]))
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "write_results", stopping)
    with pytest.raises(KeyboardInterrupt):
        everything.run(tmp_path / "stopped", **options)
    monkeypatch.setattr(study, "write_results", write)
    assert written == [1, 2, 3, 4]
    resumed = everything.run(tmp_path / "stopped", **options)

    def without_seconds(result):
        result = json.loads(json.dumps(result))
        for rows in (result["rows"], *result["groups"].values()):
            for own in rows.values():
                own.pop("seconds")
        return result

    assert without_seconds(resumed) == without_seconds(whole)
    assert list(whole["rows"]) == methods
    assert whole["rows"]["individual"]["held_out"] == {} and "digits_7_to_9" in whole["rows"]["wemoe_mi"]["held_out"]
    rows = whole["rows"]
    assert rows["wemoe_mi"]["trainable_parameters"] == 3 * (64 * 64 + 64 + 64 * 2 + 2)
    assert rows["pretrained"]["stored_numbers"] == rows["ties"]["stored_numbers"] < rows["smile"]["stored_numbers"]
    alone = whole["groups"]["1"]["average"]
    assert list(alone["accuracy"]) == names[:1] and set(alone["held_out"]) == {names[1], "digits_7_to_9"}
    assert alone["accuracy"] == {
        names[0]: rows["individual"]["accuracy"][names[0]]
    }  # the mean of one model is that model
    gates = rows["wemoe_mi"]["gates"]
    assert (
        list(gates) == names
        and [len(block) for block in gates[names[0]]] == [2, 2, 2]
        and "gates" not in rows["smile"]
    )
    with pytest.raises(ValueError, match="the group 'x' is .*; expected some of the tasks"):
        replace(everything, groups={"x": ["nobody"]})
    with pytest.raises(ValueError, match="other settings: .*tasks was "):
        replace(everything, tasks=tasks[:1]).run(tmp_path / "stopped", **options)
    fewer = replace(tasks[0], train=tasks[0].train.select(range(len(tasks[0].train) - 1)))
    with pytest.raises(ValueError, match="other settings: data_content was '.*', is '.*'. Use those of the run"):
        replace(everything, tasks=[fewer, *tasks[1:]]).run(tmp_path / "stopped", **options)

    results = {"suite": "digits", "runs": [whole, resumed]}
    print_report(results)
    printed = capsys.readouterr().out
    assert "disjoint" in printed and "digits_7_to_9" in printed and "worst task" in printed
    *pictures, page = write_report(results, tmp_path / "report")
    assert {picture.name for picture in pictures} == {"average.png", "number_of_tasks.png", "gates_wemoe_mi.png"}
    assert all(picture.stat().st_size > 5000 for picture in pictures) and "wemoe_mi, worst task" in page.read_text()


def test_differences_are_to_the_best_static_merge_seed_by_seed():
    def run(seed, **averages):
        return {"seed": seed, "tasks": ["a"], "rows": {m: {"accuracy": {"a": v}} for m, v in averages.items()}}

    runs = [run(0, ties=10.0, tsv=14.0, smile=15.0, individual=90.0), run(1, ties=12.0, tsv=11.0, smile=14.0)]
    assert best_static({"runs": runs}) == "tsv"
    rows = {method: rest for method, *rest in difference_rows({"runs": runs})[1:]}
    assert rows["smile"][0] == "+2.00 [-10.71,+14.71]"  # 1 and 3: t of one degree is 12.706
    assert rows["ties"][0].startswith(("-1.5", "−1.5")) and rows["smile"][1] == "2" and rows["individual"][1] == "1"
    assert difference_rows({"runs": [run(0, smile=1.0)]}) == [["method"]]


def test_the_first_images_of_each_class_are_the_few():
    images = TensorDataset(torch.arange(7.0), torch.tensor([1, 0, 1, 1, 0, 2, 1]))
    pixels, labels = study.few(images, 2).tensors
    assert pixels.tolist() == [0, 1, 2, 4, 5] and labels.tolist() == [1, 0, 1, 0, 2]


def test_rates_are_chosen_once_and_the_best_is_taken(tasks, tmp_path):
    settings = study.StudySettings(finetune_steps=1, adapt_steps=1, batch_size=8, adapt_batch_size=4)
    comparison = study.Study(tasks, [], build_clip, settings, Accelerator(cpu=True))
    run = comparison.material(*build_clip(), tmp_path, 0)
    found = protocol.choose_rates(run, ["wemoe", "adamerging_labels"], (1e-3, 3e-3), tmp_path / "rates.json")
    written = json.loads((tmp_path / "rates.json").read_text())
    for method, rate in found.items():
        best = max(written[method].values())
        assert str(rate) == min((r for r, value in written[method].items() if value == best), key=float)
    time_of = (tmp_path / "rates.json").stat().st_mtime_ns
    assert protocol.choose_rates(run, list(found), (1e-3, 3e-3), tmp_path / "rates.json") == found
    assert (tmp_path / "rates.json").stat().st_mtime_ns == time_of


@pytest.mark.parametrize(("peak", "asked"), [(0.03, {0.001, 0.003, 0.01, 0.03, 0.1}), (0.003, {0.001, 0.003, 0.01})])
def test_a_grid_grows_until_its_best_is_inside(peak, asked):
    seen = set()

    def value(rate):
        seen.add(rate)
        return -abs(rate - peak)

    assert protocol.best_rate((0.001, 0.003, 0.01), value) == peak and seen == asked
    assert protocol.best_rate((0.001, 0.003), lambda rate: 0.0) == protocol.LADDER[0]  # of equals the smallest
    assert protocol.best_rate((0.001, 0.003), lambda rate: rate) == protocol.LADDER[-1]


def test_zero_shot_in_times_of_chance(tasks):
    clip, processor = build_clip()
    images = load_images(tasks[0], clip, processor)
    expected = accuracy(clip, images.finetune, images.head_CD) / (100 / len(tasks[0].class_names))
    assert protocol.times_chance(tasks[:1], clip, processor) == {tasks[0].name: pytest.approx(expected)}


def test_report_means_and_intervals(tmp_path):
    assert average({"a": 10.0, "b": 20.0}) == 15.0 and average({}) is None
    runs = [{"tasks": ["a", "<b>"], "rows": {"ties": {"accuracy": {"a": 10.0 + x, "<b>": 20.0}}}} for x in (0, 2)]
    runs[1]["rows"]["wemoe"] = {"accuracy": {"a": 1.0}, "seconds": 2.0}
    results = {"suite": "digits", "runs": runs}  # the first results had no more, and the second seed was not finished
    heading, ties, wemoe = accuracy_rows(results)
    half = 12.706  # t of one degree of freedom; the standard error of 10 and 12 is 1
    assert ties[:4] == ["ties", f"11.0 ±{half:.1f}", "20.0 ±0.0", f"15.5 ±{half / 2:.1f}"]
    assert dict(zip(heading, wemoe, strict=True)) == {
        "method": "wemoe", "a": "1.0", "<b>": "-", "average": "1.0", "trainable": "-", "stored M": "-", "seconds": "2"
    }  # fmt: skip
    html = write_report(results, tmp_path)[-1].read_text()
    assert "&lt;b&gt;" in html and "<b>" not in html and "11.0 ±12.7" in html
    assert robustness_rows(results) == []
    runs[0]["robustness"] = {"gauss": {"ties": {"a": 5.0, "<b>": 7.0}}}
    assert robustness_rows(results) == [["method", "gauss"], ["ties", "6.0"], ["ties, worst task", "5.0"]]


@pytest.mark.parametrize(
    "wrong",
    [{"finetune_steps": 0}, {"adapt_batch_size": 0}, {"adapt_lr": 0.0}, {"scaling": -0.3}, {"labels_per_class": 0}],
)
def test_values_are_checked_when_they_are_given(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
        study.StudySettings(**wrong)


@pytest.mark.parametrize("entry", ["wemoe", "wemoe=fast", "wemoe=-1", "ties=0.1"])
def test_rates_of_single_methods_are_checked(entry):
    with pytest.raises(ValueError, match=f"`adapt_lrs` has '{entry}'; expected method=rate"):
        study.StudySettings(adapt_lrs=[entry])
    assert study.StudySettings(adapt_lrs=["wemoe=1e-4"]).rates == {"wemoe": 1e-4}
