"""The benchmark's data sets: the table against what is published, and copies on disk."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub.mtil_sets import class_in, picture, write_copy

from peft_moe_merge.mtil.data.hub.load import (
    check_images,
    load_hub_task,
    load_reference_images,
    load_splits,
    match_class_names,
)
from peft_moe_merge.mtil.data.hub.table import HUB_SETS, ORDER_II, REFERENCE, class_names
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.data.templates import TEMPLATES

EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# the table ------------------------------------------------------------------------------------------------------------


def test_the_table_is_what_is_published():
    """Every number of the benchmark, as its papers print them: rows of rates and accuracies, in order I."""
    assert list(HUB_SETS) == sorted(HUB_SETS) and sorted(ORDER_II) == sorted(HUB_SETS) and len(ORDER_II) == 11
    assert ORDER_II[0] == "stanford_cars" and ORDER_II[-1] == "cifar100"
    entries = HUB_SETS.values()
    assert [entry.lr for entry in entries] == [5e-3, 1e-3, 5e-3, 1e-3, 1e-4, 1e-3, 1e-3, 1e-4, 1e-3, 1e-3, 1e-3]
    assert [entry.lr_few_shot for entry in entries] == [
        8e-3,
        5e-4,
        2e-4,
        5e-3,
        1e-3,
        1e-3,
        1e-2,
        1e-4,
        1e-2,
        1e-2,
        1e-2,
    ]
    anchors = list(zip(*(entry.anchors for entry in entries), strict=True))
    assert anchors[0] == (24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2)
    assert anchors[1] == (62.0, 95.1, 89.6, 79.5, 98.9, 97.5, 92.7, 99.6, 94.7, 89.6, 81.8)
    assert anchors[2] == (None, 88.4, 68.2, 39.7, 55.3, 68.3, 88.5, 59.4, 89.0, 64.7, 64.5)
    assert anchors[3] == (51.1, 93.2, 83.6, 68.2, 80.2, 83.3, 88.7, 73.7, 89.1, 68.5, 65.9)
    assert anchors[4] == (50.7, 92.7, 86.5, 77.0, 92.6, 94.1, 89.0, 98.5, 89.2, 85.5, 79.8)
    assert {name: len(class_names(name)) for name in HUB_SETS} == {
        "aircraft": 100,
        "caltech101": 101,
        "cifar100": 100,
        "dtd": 47,
        "eurosat": 10,
        "flowers": 102,
        "food101": 101,
        "mnist": 10,
        "oxford_pet": 37,
        "stanford_cars": 196,
        "sun397": 397,
    }
    templates = {
        "aircraft": 2,
        "caltech101": 34,
        "cifar100": 18,
        "dtd": 8,
        "eurosat": 3,
        "stanford_cars": 9,
        "sun397": 2,
    }
    for name in HUB_SETS:
        forms = TEMPLATES[name]
        assert len(set(forms)) == len(forms) == templates.get(name, 1)
        assert all(form.count("{}") == 1 and "*" not in form for form in forms)
    assert TEMPLATES["caltech101"][2] == "a plastic {}." and TEMPLATES["caltech101"][-5] == "the origami {}."


@pytest.mark.parametrize("name", HUB_SETS)
def test_no_two_classes_of_a_task_read_alike(name):
    assert list(match_class_names(name, class_names(name)).values()) == list(range(len(class_names(name))))


# names ----------------------------------------------------------------------------------------------------------------


def test_names_match_whatever_their_order_and_spelling():
    spelt = ["Sea-Lake", "RIVER", "AnnualCrop", "forest", "herbaceous vegetation", "Highway", "Industrial", "pasture"]
    matched = match_class_names("eurosat", [*spelt, "permanent_crop", "Residential Buildings"])
    assert matched["Sea-Lake"] == 9 and matched["RIVER"] == 8 and matched["herbaceous vegetation"] == 2
    assert match_class_names("sun397", [f"/{name[0]}/{name}".replace(" ", "/") for name in class_names("sun397")])


def test_names_that_do_not_match_are_shown_side_by_side():
    names = [str(number) for number in range(9)] + ["sheep", "8!"]
    with pytest.raises(ValueError) as caught:
        match_class_names("mnist", names)
    message = str(caught.value)
    assert "1 of 10 classes have no label" in message and "1 of its 11 labels have no class, 1 share one" in message
    assert any(
        line.split("|")[0].strip() == "9" and line.split("|")[1].strip() == "sheep" for line in message.split("\n")
    )
    assert "class_names/mnist.txt" in message


# copies on disk -------------------------------------------------------------------------------------------------------


def save(folder: Path, task: str, splits: dict[str, Dataset]) -> Path:
    for split, dataset in splits.items():
        (folder / task / "data").mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / task / "data" / f"{split}-0.parquet")
    return folder


def digits(labels=tuple(range(10)), feature=None, column="label", image="image") -> Dataset:
    feature = feature or ClassLabel(names=[str(number) for number in range(10)])
    pictures = [{"bytes": picture(row % 10, "L"), "path": None} for row in range(len(labels))]
    return Dataset.from_dict(
        {image: pictures, column: list(labels)}, features=Features({image: Image(), column: feature})
    )


def load(folder: Path, task: str = "mnist", **options) -> Task:
    return load_hub_task(task, data_dir=folder, **{"allow_size_mismatch": True, **options})


def test_sizes_are_checked(tmp_path):
    write_copy(tmp_path / "dtd", "dtd", {"train": 1880, "validation": 3, "test": 1880})
    task = load(tmp_path, "dtd", allow_size_mismatch=False)
    assert (len(task.train), len(task.test), task.lr) == (1880, 1880, 1e-3)
    assert load(tmp_path, "dtd", few_shot=True).lr == 5e-3
    write_copy(tmp_path / "mnist", "mnist", 2)
    with pytest.raises(
        ValueError, match="(?s)20 images to train and 20 to test.*60000 and 10000.*allow_size_mismatch"
    ):
        load(tmp_path, allow_size_mismatch=False)


def test_caltech_is_divided_as_random_split_does(tmp_path):
    """All images but the background's, four fifths and one, by `random_split` with seed 42 and no other way."""
    import torch
    from torch.utils.data import random_split

    write_copy(tmp_path / "caltech101", "caltech101", 2)
    task = load(tmp_path, "caltech101")
    kept = [class_in(row["image"]) for split in ("train", "test") for row in load_raw(tmp_path, split)]
    train, test = random_split(kept, [323, 81], generator=torch.Generator().manual_seed(42))
    assert len(kept) == 404 and (len(task.train), len(task.test)) == (323, 81)
    assert sorted(task.test["label"]) == sorted(test) and sorted(task.train["label"]) == sorted(train)
    assert all(class_in(row["image"]) == row["label"] for part in (task.train, task.test) for row in part)


def load_raw(folder: Path, split: str) -> Dataset:
    dataset = load_splits("caltech101", HUB_SETS["caltech101"], data_dir=folder)[split]
    names = dataset.features["label"].names
    return dataset.filter(lambda label: names[label] != "background_google", input_columns="label")


def test_the_reference_set(tmp_path):
    save(tmp_path, REFERENCE, {"train": digits(), "valid": digits()})
    images = load_reference_images(data_dir=tmp_path, allow_size_mismatch=True)
    assert [class_in(row["image"]) for row in images] == list(range(10)) and images[0]["image"].mode == "RGB"
    with pytest.raises(ValueError, match="'tiny_imagenet' has 10 images to train and 0 to test on.*100000 and 0"):
        load_reference_images(data_dir=tmp_path)


def test_few_images_of_each_class(tmp_path):
    for task in ("mnist", "eurosat"):
        write_copy(tmp_path / task, task, 7)
    tasks = load_suite(
        "mtil", ["mnist", "eurosat"], few_shot=5, data_dir=str(tmp_path), allow_size_mismatch=True, progress=False
    )
    assert [task.lr for task in tasks] == [1e-4, 1e-3]
    for task in tasks:
        assert np.bincount(task.train["label"]).tolist() == [5] * 10
        assert all(class_in(row["image"]) == row["label"] for row in task.train)


def no_column(folder):
    save(folder, "mnist", {"train": digits(column="digit"), "test": digits(column="digit")})


def no_split(folder):
    save(folder, "mnist", {"train": digits(), "validation": digits()})


def bare_numbers(folder):
    save(folder, "mnist", {split: digits(feature=Value("int64")) for split in ("train", "test")})


def unknown_label(folder):
    save(folder, "mnist", {"train": digits(labels=(3, 4, -1, 5)), "test": digits()})


def no_label(folder):
    save(folder, "mnist", {"train": digits(labels=(3, None, 4)), "test": digits()})


def foreign_names(folder):
    save(folder, "mnist", {split: digits(feature=ClassLabel(names=list("abcdefghij"))) for split in ("train", "test")})


def cut_short(folder):
    save(folder, "mnist", {"train": digits(), "test": digits()})
    path = folder / "mnist" / "data" / "train-0.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_image(folder):
    broken = digits().to_dict()
    broken["image"][5]["bytes"] = broken["image"][5]["bytes"][:40]
    save(folder, "mnist", {"train": digits(), "test": Dataset.from_dict(broken, features=digits().features)})


def null_image(folder):
    """Not one of the three rows that are decoded."""
    broken = digits().to_dict()
    broken["image"][6] = None
    save(folder, "mnist", {"train": digits(), "test": Dataset.from_dict(broken, features=digits().features)})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: None, FileNotFoundError, "No folder '.*mnist'.*hf download --repo-type dataset ylecun/mnist"),
        (
            no_column,
            ValueError,
            r"'mnist': no column 'label' in split 'train' of '.*mnist'; there are \['image', 'digit'\]",
        ),
        (no_split, ValueError, r"'mnist': no split 'test' in '.*mnist'; there are \['train', 'validation'\]"),
        (bare_numbers, ValueError, "numbers without names.*label_names"),
        (unknown_label, ValueError, "'mnist', split 'train', row 2: label -1 is none of 10 classes"),
        (no_label, ValueError, "'mnist', split 'train', row 1: label -1 is none of 10 classes"),
        (foreign_names, ValueError, r"(?s)10 of 10 classes have no label.*  0 +\| a\n"),
        (cut_short, ValueError, "'mnist': '.*mnist' can't be read.*--force_download"),
        (null_image, ValueError, "'mnist', split 'test': no image in 1 of 10 rows: 6"),
        (corrupt_image, ValueError, r"(?s)'mnist' has 1 images that can't be read.*mnist, split 'test', row 5: "),
    ],
)
def test_bad_copies(tmp_path, damage, error, message):
    damage(tmp_path)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_labels_as_words(tmp_path):
    words = ["seven", "one", "two", "three", "four", "five", "six", "zero", "eight", "nine"]
    save(tmp_path, "mnist", {split: digits(labels=words, feature=Value("string")) for split in ("train", "test")})
    assert load(tmp_path).train["label"][:] == [7, 1, 2, 3, 4, 5, 6, 0, 8, 9]


def test_every_image_is_decoded_when_asked(tmp_path):
    """Loading looks at three images a split; row 2 escapes it, but not the full check."""
    broken = digits().to_dict()
    broken["image"][2]["bytes"] = b"no image"
    save(tmp_path, "mnist", {"train": Dataset.from_dict(broken, features=digits().features), "test": digits()})
    splits = load_splits("mnist", HUB_SETS["mnist"], data_dir=tmp_path)
    check_images("mnist", "image", splits, few=True)
    with pytest.raises(ValueError, match="(?s)has 1 images.*mnist, split 'train', row 2"):
        check_images("mnist", "image", splits)


def test_orders_are_checked_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="No order 'III' of the suite 'mtil'"):
        load_suite("mtil", order="III", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="The suite 'mtil' has no task 'cars'"):
        load_suite("mtil", ["cars"])
