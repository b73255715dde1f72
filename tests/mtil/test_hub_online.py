"""The benchmark's data sets over HTTP, from a Hub on 127.0.0.1."""

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
from hub.loopback import LoopbackHub
from hub.mtil_sets import serve

from peft_moe_merge.mtil.data.hub.table import HUB_SETS, ORDER_II, REFERENCE, class_names

EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"
TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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
