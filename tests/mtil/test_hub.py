"""The benchmark's data sets: the table against what is published, copies on disk, and over HTTP from a Hub on 127.0.0.1."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub.loopback import LoopbackHub
from hub.mtil_sets import class_in, picture, serve, write_copy

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


# over HTTP ------------------------------------------------------------------------------------------------------------

CLIENT = """
import contextlib, io, json, sys
sys.path.insert(0, {tests!r})
import datasets
datasets.disable_progress_bars()
from hub.mtil_sets import class_in
from huggingface_hub.utils import close_session
from peft_moe_merge.mtil.data.hub import load, prefetch

def tell(name):
    if name == {reference!r}:
        return len(load.load_reference_images())
    task = load.load_hub_task(name, allow_size_mismatch=True)
    rows = [*task.train, *task.test]
    return [len(task.train), len(task.test), all(class_in(row["image"]) == row["label"] for row in rows)]

for line in sys.stdin:
    told = {{}}
    command, *arguments = json.loads(line)
    if command == "prefetch":
        sys.argv[1:] = arguments
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            try:
                prefetch.main()
            except SystemExit as error:
                told["exit"] = str(error)
        told["printed"] = printed.getvalue()
    if command == "disconnect":
        close_session()
    for name in arguments if command == "load" else ():
        try:
            told[name] = tell(name)
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
    print("TOLD" + json.dumps(told), flush=True)
"""


@contextmanager
def client(hub: LoopbackHub, home: Path, **environment: str) -> Iterator[Callable[..., dict]]:
    """A process of its own with the caches below `home`; it loads tasks, and tells sizes and errors."""
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT.format(tests=str(TESTS), reference=REFERENCE)],
        env=hub.environment(home) | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def ask(*command: str) -> dict:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith("TOLD"):
                    return json.loads(line.removeprefix("TOLD"))
            raise AssertionError("the client has died")

        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> Iterator[tuple[LoopbackHub, Path, Callable[..., dict]]]:
    """A Hub with all eleven, and one client of it with caches of its own: a process takes long to start."""
    folder = tmp_path_factory.mktemp("online")
    hub = LoopbackHub(folder / "hub")
    hub.start()
    for task in HUB_SETS:
        serve(hub, folder, task)
    with client(hub, folder / "home") as ask:
        yield hub, folder / "home", ask
    hub.stop()


def test_what_goes_wrong_on_the_way(online):
    """Gated, renamed, missing, refused, cut short: each is told apart, and the cache serves once the cause is gone."""
    hub, home, ask = online
    eurosat, aircraft = (HUB_SETS[name].hub_id for name in ("eurosat", "aircraft"))
    hub.repos["dataset", eurosat].gated = True
    hub.rename("dataset", HUB_SETS["dtd"].hub_id, "mcimpoi/textures")
    missing = hub.repos.pop(("dataset", aircraft))
    hub.fail("oxford-iiit-pet/resolve/.*parquet", status=403)
    hub.cut("name=mnist.*train-00000", at=100)  # this connection breaks whenever it is tried
    hub.cut("name=.*test-00000", at=100, times=1)  # this one once; the client goes on where it stopped
    told = ask("load", "eurosat", "dtd", "aircraft", "mnist", "oxford_pet")
    assert told["eurosat"][0] == "PermissionError" and "Accept its conditions" in told["eurosat"][1]
    assert told["dtd"] == [47, 47, True], "a renamed repository redirects"
    assert told["aircraft"][0] == "FileNotFoundError" and f"there is no '{aircraft}'" in told["aircraft"][1]
    assert told["mnist"][0] == "ConnectionError" and "broke off" in told["mnist"][1]
    assert told["oxford_pet"][0] == "PermissionError" and "403" in told["oxford_pet"][1]

    hub.repos["dataset", eurosat].gated = False
    hub.repos["dataset", aircraft] = missing
    hub.faults.clear()
    assert ask("load", "eurosat", "aircraft", "mnist", "oxford_pet") == {
        "eurosat": [20, 10, True],
        "aircraft": [100, 100, True],
        "mnist": [10, 10, True],
        "oxford_pet": [37, 37, True],
    }

    # a cache that was copied incompletely
    (blob,) = (path.resolve() for path in home.rglob("mnist/train-00000-of-00001.parquet"))
    blob.write_bytes(blob.read_bytes()[:-100])
    shutil.rmtree(home / "datasets" / "ylecun___mnist")
    kind, message = ask("load", "mnist")["mnist"]
    assert kind == "ValueError" and "cut short" in message and "--force_download" in message
    assert "ready" in ask("prefetch", "--force_download", "--allow_size_mismatch", "mnist")["printed"]
    assert ask("load", "mnist") == {"mnist": [10, 10, True]}


def test_all_eleven_from_the_hub_then_from_its_cache(online):
    hub, home, ask = online
    expected = {name: [len(class_names(name)), len(class_names(name)), True] for name in HUB_SETS}
    expected |= {"caltech101": [161, 41, True], "eurosat": [20, 10, True], "sun397": [794, 397, True]}
    assert ask("load", *HUB_SETS) == expected
    assert hub.asked("GET .*/resolve/77f3279092a1c1579b2250db8eafed0ad422088c/"), "the pinned revision is asked for"
    told = ask("prefetch", "--allow_size_mismatch", "--verify", "mnist", "eurosat")
    assert "exit" not in told and all(word in told["printed"] for word in ("ylecun/mnist", "MIT", "20", "ready"))
    told = ask("prefetch", "mnist", "dtd")
    assert "60000 and 10000" in told["exit"] and "1880 and 1880" in told["exit"] and "failed" in told["printed"]
    before = len(list(home.rglob("*.parquet")))
    told = ask("prefetch", "--peek", "2", "cifar100")
    assert "exit" not in told and len(list(home.rglob("*.parquet"))) == before

    hub.stop()
    ask("disconnect")
    kind, message = ask("load", REFERENCE)[REFERENCE]
    assert kind == "ConnectionError" and "can't reach the Hub for 'zh-plus/tiny-imagenet'" in message
    before = len(hub.requests)
    with client(hub, home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1") as offline:
        assert offline("load", *HUB_SETS) == expected
        kind, message = offline("load", REFERENCE)[REFERENCE]
        assert kind == "ConnectionError" and "unset HF_HUB_OFFLINE" in message
    assert len(hub.requests) == before


def test_the_whole_way_through_the_example(hub, tmp_path):
    """Three data sets over HTTP, five images of each class: rates, order and published numbers are the benchmark's."""
    for task in ("mnist", "eurosat", "dtd"):
        serve(hub, tmp_path, task, 6)
    arguments = ["--suite", "mtil", "--tasks", "mnist", "dtd", "eurosat", "--few_shot", "5", "--allow_size_mismatch"]
    arguments += ["--model", "untrained", "--methods", "zero_shot", "moe_lora_merge", "--cpu", "--steps", "3"]
    arguments += ["--batch_size", "8", "--num_experts", "4", "--r", "4", "--merge_every", "2"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments, "--output_dir", str(tmp_path / "run")],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [request.path for request in hub.asked("^GET .*parquet")]
    assert len(files) == len(set(files)) > 0, "nothing is loaded twice"
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"] == ["mnist", "dtd", "eurosat"] and results["settings"]["lr"] == [1e-4, 5e-3, 1e-3]
    for run in (results["methods"]["zero_shot"][0], results["methods"]["moe_lora_merge"][0]):
        assert np.array(run["matrix"]).shape == (3, 3)
    assert "† arXiv 2405.11530" in done.stdout and "NOT comparable" in done.stdout
    assert "few_shot 5 instead of None" in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    assert "98.5" in page and "few_shot 5 instead of None" in page


@pytest.mark.slow
def test_the_whole_benchmark_through_the_example(hub, tmp_path):
    """All eleven, in order II."""
    for task in HUB_SETS:
        serve(hub, tmp_path, task)
    arguments = ["--suite", "mtil", "--order", "II", "--allow_size_mismatch", "--model", "untrained", "--cpu"]
    arguments += ["--methods", "moe_lora_merge", "--steps", "2", "--batch_size", "4", "--num_experts", "4", "--r", "4"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments, "--output_dir", str(tmp_path / "run")],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["tasks"] == list(ORDER_II)
    assert results["settings"]["lr"] == [HUB_SETS[name].lr for name in ORDER_II]
    assert np.array(results["methods"]["moe_lora_merge"][0]["matrix"]).shape == (11, 11)
