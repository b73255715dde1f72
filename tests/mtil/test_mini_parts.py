"""Mini in parts: every class in one part, with its own images."""

from types import SimpleNamespace

import numpy as np

from peft_moe_merge.mtil.data.mini import TASKS, load_task
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.suites.mini_parts import MiniParts


def test_parts_share_out_all_classes_in_order():
    suite = MiniParts()
    classes = {}
    for name in suite.task_names():
        whole, part = name.rsplit("_", 1)
        task = suite.load_task(name, SimpleNamespace()) if whole in ("shapes", "digits") else None
        classes.setdefault(whole, []).append((int(part), task))
    assert sum(map(len, classes.values())) >= 50
    for whole in ("shapes", "digits"):
        numbers, parts = zip(*classes[whole], strict=True)
        assert numbers == tuple(range(1, len(parts) + 1))
        assert [name for part in parts for name in part.class_names] == list(TASKS[whole].classes)
        assert {len(part.class_names) for part in parts} <= {2, 3}


def test_a_part_has_the_images_of_its_classes():
    for name, split in (("food_2", "train"), ("digits_3", "test")):
        whole = name.rsplit("_", 1)[0]
        task = MiniParts().load_task(name, SimpleNamespace())
        rows, everything = getattr(task, split), load_task(whole, split)
        names = TASKS[whole].classes
        wanted = [
            (np.asarray(image).tobytes(), names[label])
            for image, label in zip(everything["image"], everything["label"], strict=True)
            if names[label] in task.class_names
        ]
        got = [
            (np.asarray(i).tobytes(), task.class_names[label])
            for i, label in zip(rows["image"], rows["label"], strict=True)
        ]
        assert got == wanted and tuple(rows.features["label"].names) == task.class_names


def test_few_images_of_a_class():
    (task,) = load_suite("mini_parts", tasks=["animals_1"], few_shot=5, seed=3, progress=False)
    assert np.bincount(task.train["label"]).tolist() == [5] * len(task.class_names)
