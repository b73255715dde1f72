"""The classifier of a run on the embedded benchmark: `make demo` leaves an adapter, this adds classes and a selector."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from PIL.Image import Image
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig, TaskClasses
from peft_moe_merge.mtil.checkpoint import PROGRESS, newest
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path
from peft_moe_merge.selection import Depths, DiscriminantSelector, Selector

BATCH = 256
DEPTH = 2  # blocks of the image tower that the selector looks through


def newest_adapter(runs: Path) -> Path:
    """Find the checkpoint that was written last, of all methods and seeds of a run that have experts.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [newest(folder) for folder in runs.glob("*/seed_*")]
    adapters = [one for one in found if one is not None and _has_experts(one)]
    if not adapters:
        raise FileNotFoundError(
            f"No adapter under {str(runs)!r}. `make demo` trains one; or name one of the Hub by `--adapter user/name`."
        )
    return max(adapters, key=lambda checkpoint: (checkpoint / PROGRESS).stat().st_mtime_ns)


def embedded_classifier(checkpoint: Path) -> ContinualClassifier:
    """Load a checkpoint of the embedded benchmark. One without a selector gets one, fitted on the training images in seconds;
    one that brings its own (`moe_lora_fused`) lets it have a say in the class, too.

    Raises:
        ValueError: the checkpoint is of another suite, whose classes and images are not here.
    """
    tasks = PeftConfig.from_pretrained(checkpoint).tasks
    if foreign := [name for name in tasks if name not in TASKS]:
        raise ValueError(
            f"{str(checkpoint)!r} has learnt {foreign}, which are not of the embedded benchmark. Publish it by "
            "`examples/mtil.py --push_to_hub user/name`, and name it by `--adapter user/name`."
        )
    processor = CLIPProcessor.from_pretrained(mini_clip_path())
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(mini_clip_path()), checkpoint).eval()
    brings_its_own = model.task_selector is not None
    if not brings_its_own:
        model.attach_selector(fitted_selector(model, processor, tasks))
    classes = {name: TaskClasses(TASKS[name].classes, TASKS[name].templates) for name in tasks}
    return ContinualClassifier(model, processor, classes, fuse=brings_its_own)


@torch.no_grad()
def fitted_selector(model: PeftModel, processor: CLIPProcessor, tasks: list[str]) -> Selector:
    """Fit a selector on the training images of tasks of the embedded benchmark."""
    selector = DiscriminantSelector(Depths((DEPTH,)), means="classes")
    for name in tasks:
        train = load_task(name, "train")
        batches = []
        for start in range(0, len(train), BATCH):
            part = train[start : start + BATCH]
            pixels = processor(images=part["image"], return_tensors="pt")["pixel_values"]
            batches.append((model.frozen_features(selector.source, pixels), torch.tensor(part["label"])))
        selector.fit(name, batches)
    return selector


def sample_images(tasks: list[str]) -> dict[str, Image]:
    """Return a test image of each task, by the task's name."""
    images = {}
    for position, name in enumerate(tasks):
        test = load_task(name, "test")
        images[name] = test[(37 * position) % len(test)]["image"]  # not of the first class everywhere
    return images


def _has_experts(checkpoint: Path) -> bool:
    try:
        return isinstance(PeftConfig.from_pretrained(checkpoint), MoELoraMergeConfig)
    except (OSError, ValueError):  # a method that is no adapter
        return False
