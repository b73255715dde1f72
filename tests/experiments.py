"""Experiments on a few images, which several tests make."""

import json

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from peft_moe_merge.mtil.clip import ModelSettings, small_clip
from peft_moe_merge.mtil.data.suites import DataSettings
from peft_moe_merge.mtil.experiment import Experiment
from peft_moe_merge.mtil.methods import MethodSettings
from peft_moe_merge.mtil.results import add_run, extended_results, run_result, write_results
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.stream import StreamSettings

TASKS = {"birds": ("hen", "owl"), "tools": ("saw", "axe")}


def write_images(root, per_class=4):
    generator = np.random.default_rng(0)
    for task, classes in TASKS.items():
        for split in ("train", "test"):
            for name in classes:
                folder = root / task / split / name
                folder.mkdir(parents=True)
                for index in range(per_class):
                    pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    for part in small_clip(f"a photo of a {name}." for classes in TASKS.values() for name in classes):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def experiment(images, clip_folder):
    def build(*, data=None, model=None, training=None, methods=None, selection=None):
        return Experiment(
            DataSettings(**({"suite": str(images)} | (data or {}))),
            ModelSettings(str(model or clip_folder)),
            StreamSettings(**({"steps": 2, "batch_size": 4, "eval_batch_size": 8} | (training or {}))),
            MethodSettings(**({"num_experts": 4, "r": 2, "lora_r": 2, "exemplars": 8} | (methods or {}))),
            SelectorSettings(**(selection or {})),
            Accelerator(cpu=True),
        )

    return build


def play(experiment, folder, methods=("zero_shot",), seeds=(0,), **how):
    """What the example does, without its report."""
    experiment.check(methods, seeds, folder, resume=how.get("resume", False))
    path = folder / "results.json"
    results = extended_results(path, experiment.results())
    for name in methods:
        for seed in seeds:
            progress = experiment.run(name, seed, folder, **how)
            if len(progress.matrix) == len(TASKS):
                add_run(results, name, run_result(seed, progress))
    if results["methods"]:
        write_results(path, results)
    return results


def without_seconds(results):
    results = json.loads(json.dumps(results))
    for runs in results["methods"].values():
        for run in runs:
            run.pop("seconds")
    return results
