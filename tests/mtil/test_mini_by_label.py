"""Mini's things and places cut by likeness of labels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import TASKS, load_task, mini_clip_path
from peft_moe_merge.mtil.data.suites import SUITES
from peft_moe_merge.mtil.data.suites.mini_by_label import SOURCES


@pytest.fixture(scope="module")
def loaded():
    return {
        name: [SUITES[name]().load_task(task, SimpleNamespace()) for task in SUITES[name]().task_names()]
        for name in ("mini_similar", "mini_dissimilar")
    }


def test_both_have_all_classes_once_and_the_same_images(loaded):
    everything = sorted(name for source in SOURCES for name in TASKS[source].classes)
    images = []
    for tasks in loaded.values():
        assert sorted(name for task in tasks for name in task.class_names) == everything
        assert {len(task.class_names) for task in tasks} == {8}
        images.append(
            sorted(
                (task.class_names[label], np.asarray(image).tobytes())
                for task in tasks
                for image, label in zip(task.test["image"], task.test["label"], strict=True)
            )
        )
    assert images[0] == images[1]
    foxes = [
        np.asarray(i).tobytes()
        for i, label in zip(*load_task("animals", "test")[:].values(), strict=True)
        if label == 4
    ]
    assert sorted(foxes) == [pixels for name, pixels in images[0] if name == "fox"]


def test_classes_of_a_task_are_more_alike_in_the_one_than_in_the_other(loaded):
    clip, processor = load_clip(mini_clip_path())

    def likeness(tasks):
        of_each = []
        for task in tasks:
            tokens = processor(text=[f"a photo of {n}." for n in task.class_names], return_tensors="pt", padding=True)
            with torch.no_grad():
                texts_CP = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1)
            cosines_CC = texts_CP @ texts_CP.T
            of_each.append(cosines_CC[~torch.eye(len(cosines_CC), dtype=bool)].mean().item())
        return sum(of_each) / len(of_each)

    assert likeness(loaded["mini_similar"]) > likeness(loaded["mini_dissimilar"]) + 0.1
