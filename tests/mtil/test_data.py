"""Image folders, digits and batches."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.data.batches import eval_batches, train_batches
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.folders import load_folders

PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def write(path, value=0, mode="RGB", size=(20, 18)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.full((size[1], size[0]), value, dtype=np.uint8)).convert(mode)
    image.save(path)


@pytest.fixture
def root(tmp_path):
    """Two tasks; one has a class called like a split, one has grey and palette images."""
    for split, count in (("train", 6), ("test", 2)):
        for index in range(count):
            write(tmp_path / "traffic" / split / "train" / f"{index}.png", 250)
            write(tmp_path / "traffic" / split / "fire_engine" / f"{index}.jpg", 10)
            write(tmp_path / "signs" / split / "stop" / f"{index}.png", 200, mode="L")
            write(tmp_path / "signs" / split / "give_way" / f"{index}.gif", 100, mode="P")
    return tmp_path


def test_folders(root):
    signs, traffic = load_folders(root, progress=False)
    assert (signs.name, traffic.name) == ("signs", "traffic")
    assert traffic.class_names == ("fire engine", "train") and signs.class_names == ("give way", "stop")
    assert (len(traffic.train), len(traffic.test)) == (12, 4)
    assert traffic.prompts(traffic.templates[0]) == ["a photo of a fire engine.", "a photo of a train."]
    for row in traffic.test:
        bright = np.asarray(row["image"]).mean() > 128
        assert traffic.class_names[row["label"]] == ("train" if bright else "fire engine")
    assert {row["image"].mode for row in signs.train} == {"RGB"}
    assert [task.name for task in load_folders(root, ["traffic", "signs"], progress=False)] == ["traffic", "signs"]


def test_known_tasks_have_clips_templates(root):
    (root / "signs").rename(root / "mnist")
    (mnist,) = load_folders(root, ["mnist"], progress=False)
    assert mnist.prompts(mnist.templates[0])[1] == 'a photo of the number: "stop".'


def corrupt(root):
    (root / "signs" / "train" / "stop" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n rubbish")
    path = root / "traffic" / "test" / "train" / "1.png"
    path.write_bytes(path.read_bytes()[:60])


def empty(root):
    for path in (root / "signs" / "test").rglob("*.*"):
        path.unlink()


def one_class(root):
    for split in ("train", "test"):
        shutil.rmtree(root / "signs" / split / "stop")


def other_classes(root):
    (root / "signs" / "test" / "stop").rename(root / "signs" / "test" / "go")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (corrupt, ValueError, r"(?s)2 of 32 images can't be read.*signs/train/stop/0\.png.*traffic/test/train/1\.png"),
        (empty, FileNotFoundError, r"No images in '.*signs/test'"),
        (one_class, ValueError, "'signs' has one class, 'give_way'"),
        (other_classes, ValueError, r"Only in train: \['stop'\]; only in test: \['go'\]"),
    ],
)
def test_bad_folders(root, damage, error, message):
    damage(root)
    with pytest.raises(error, match=message):
        load_folders(root, progress=False)


def test_missing_folders(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="No folder"):
        load_folders(root / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"No task 'cars'.*\['signs', 'traffic'\]"):
        load_folders(root, ["cars"])
    with pytest.raises(FileNotFoundError, match=r"holds no task.*<root>/<task>/<train\|test>"):
        load_folders(root / "signs" / "train" / "stop")


def test_digits():
    tasks = load_digit_tasks()
    assert [len(task.class_names) for task in tasks] == [4, 3, 3]
    assert sum(len(task.train) + len(task.test) for task in tasks) == 1797
    assert tasks[1].prompts(tasks[1].templates[0])[0] == 'a photo of the number: "4".'
    seen = {row["image"].tobytes() for task in tasks for row in task.train}
    assert np.mean([row["image"].tobytes() in seen for task in tasks for row in task.test]) < 0.02
    zeros = np.mean([np.asarray(row["image"]) for row in tasks[0].train if row["label"] == 0], axis=0)
    ones = np.mean([np.asarray(row["image"]) for row in tasks[0].train if row["label"] == 1], axis=0)
    assert zeros[3:5, 3:5].mean() < 60 < ones[3:5, 3:5].mean(), "a zero is hollow, a one is not"


def batches(dataset, **kwargs):
    arguments = {"steps": 7, "batch_size": 5, "seed": 3, "crop_scale": 0.5, **kwargs}
    return list(train_batches(dataset, PROCESSOR, **arguments))


def test_training_batches(root):
    (_, traffic) = load_folders(root, progress=False)
    drawn = batches(traffic.train)
    assert len(drawn) == 7 and all(batch["pixel_values"].shape == (5, 3, 16, 16) for batch in drawn)
    labels = torch.cat([batch["labels"] for batch in drawn])
    assert sorted(labels[:12].tolist()) == [0] * 6 + [1] * 6, "every image once, then again"
    mean, std = torch.tensor(PROCESSOR.image_mean), torch.tensor(PROCESSOR.image_std)
    for batch in drawn:
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            expected = ((250 if label else 10) / 255 - mean) / std
            torch.testing.assert_close(pixels.mean(dim=(1, 2)), expected, atol=0.05, rtol=0)
    again, other = batches(traffic.train), batches(traffic.train, seed=4)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(drawn, again, strict=True))
    assert not all(torch.equal(a["labels"], b["labels"]) for a, b in zip(drawn, other, strict=True))


def test_crops_keep_at_least_the_asked_for_area(tmp_path):
    gradient = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (128, 1))
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "task" / split / name).mkdir(parents=True)
            Image.fromarray(gradient).convert("RGB").save(tmp_path / "task" / split / name / "0.png")
    (task,) = load_folders(tmp_path, progress=False)

    def widths(crop_scale):
        torch.manual_seed(0)
        drawn = batches(task.train, steps=30, batch_size=2, crop_scale=crop_scale)
        pixels = torch.cat([batch["pixel_values"][:, 0] for batch in drawn]) * PROCESSOR.image_std[0]
        return pixels[:, :, -1].mean(dim=1) - pixels[:, :, 0].mean(dim=1)  # how much of the gradient is in view

    assert widths(1.0).min() > 0.85
    assert 0.4 < widths(0.3).min() < 0.7


def test_test_batches_are_the_processors(root):
    (_, traffic) = load_folders(root, progress=False)
    (batch,) = eval_batches(traffic.test, PROCESSOR, batch_size=8)
    expected = PROCESSOR([row["image"] for row in traffic.test], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected) and batch["labels"].tolist() == traffic.test["label"][:]
