"""Image folders as people have them: what is a class, what is an image, and what is told of the rest."""

import os
import pickle
import shutil
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Image as ImageFeature
from PIL import Image, features
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.batches import eval_batches, train_batches
from peft_moe_merge.mtil.data.folders import load_folders
from peft_moe_merge.mtil.data.reference import load_reference
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.model_merging.images import load_images

PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
SPLITS = ("train", "test")


def write(path: Path, grey: int, kind: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((18, 20, 3), grey, np.uint8)).save(path, kind)


def write_task(folder: Path, **classes: int) -> Path:
    """Classes of grey images; 3 each to train, 2 to test."""
    for name, grey in classes.items():
        for split, count in zip(SPLITS, (3, 2), strict=True):
            for index in range(count):
                write(folder / split / name / f"{index}.png", grey)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_task(tmp_path / "stream" / "birds", crow=40, gull=200, owl=120)
    return tmp_path / "stream"


def load(root: Path) -> Task:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing may be skipped where nothing is said of it
        (task,) = load_folders(root, progress=False)
    return task


def classes_by_grey(task: Task, split: str) -> dict[int, str]:
    return {
        round(np.asarray(row["image"].convert("L")).mean()): task.class_names[row["label"]]
        for row in getattr(task, split)
    }


# one listing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("linked", [("test",), ("train",), SPLITS])
def test_linked_class_folders(root, tmp_path, linked):
    for split in linked:
        folder = root / "birds" / split / "crow"
        shutil.move(folder, tmp_path / f"elsewhere_{split}")
        folder.symlink_to(tmp_path / f"elsewhere_{split}")
    task = load(root)
    assert task.class_names == ("crow", "gull", "owl")
    for split in SPLITS:
        assert classes_by_grey(task, split) == {40: "crow", 200: "gull", 120: "owl"}


def test_linked_images_and_a_linked_root(root, tmp_path):
    image = root / "birds" / "train" / "gull" / "1.png"
    shutil.move(image, tmp_path / "stored.png")
    image.symlink_to(tmp_path / "stored.png")
    (tmp_path / "link").symlink_to(root)
    task = load(tmp_path / "link")
    assert len(task.train) == 9 and classes_by_grey(task, "train")[200] == "gull"


@pytest.mark.parametrize("suffix", [".avif", ".webp", ".JPG", ".jp2", ".tif", ".bmp", ".jfif", ".ppm"])
def test_every_suffix_that_pillow_opens(root, suffix):
    kind = Image.registered_extensions()[suffix.lower()]
    if suffix in (".avif", ".webp") and not features.check(suffix[1:]):
        pytest.skip(f"this Pillow has no {suffix}")
    for split in SPLITS:
        for path in list((root / "birds" / split / "crow").iterdir()):
            path.unlink()
            write(path.with_suffix(suffix), 40, kind)
    task = load(root)
    assert task.class_names == ("crow", "gull", "owl") and (len(task.train), len(task.test)) == (9, 6)
    by_grey = classes_by_grey(task, "test")
    assert by_grey[200] == "gull" and by_grey[120] == "owl" and sorted(by_grey.values()) == ["crow", "gull", "owl"]


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("__background__", "background"),
        ("train", "train"),
        ("a [b] {c} *?", "a [b] {c} *?"),
        ("Übermäßig_große_Möwe", "Übermäßig große Möwe"),
        ("海鳥", "海鳥"),
        ("x.png", "x.png"),
        ("_", "_"),
    ],
)
def test_a_class_may_have_any_name(root, folder, name):
    write_task(root / "birds", **{folder: 80})
    task = load(root)
    assert sorted(task.class_names) == sorted(["crow", "gull", "owl", name])
    for split in SPLITS:
        assert classes_by_grey(task, split) == {40: "crow", 200: "gull", 120: "owl", 80: name}


def test_any_path(root, tmp_path, monkeypatch):
    """Relative, with characters that mean something in patterns; read from another folder."""
    odd = tmp_path / "my [images] {1} *" / "größe"
    odd.parent.mkdir()
    shutil.move(root, odd)
    monkeypatch.chdir(odd.parent)
    task = load(Path("größe"))
    monkeypatch.chdir("/")
    assert classes_by_grey(task, "train") == {40: "crow", 200: "gull", 120: "owl"}


def test_accents_stored_apart_are_the_same_class(root):
    """As macOS may write them."""
    write_task(root / "birds", **{unicodedata.normalize("NFC", "möwe"): 80})
    folder = root / "birds" / "test"
    (folder / unicodedata.normalize("NFC", "möwe")).rename(folder / unicodedata.normalize("NFD", "möwe"))
    assert classes_by_grey(load(root), "test")[80] == unicodedata.normalize("NFC", "möwe")


def test_what_is_skipped_is_told(root):
    birds = root / "birds"
    (root / "README.md").write_text("what this is")
    write(birds / "val" / "crow" / "0.png", 0)
    (birds / "train" / "list.csv").write_text("in no class folder")
    write(birds / "train" / "crow" / ".0.png", 0)
    (birds / "train" / "crow" / "notes.txt").write_text("no image")
    write(birds / "train" / "crow" / "0", 0, "PNG")
    write(birds / "train" / "crow" / "more" / "0.png", 0)
    write(birds / "test" / ".thumbnails" / "0.png", 0)
    with pytest.warns(UserWarning) as told:
        (task,) = load_folders(root, progress=False)
    assert len(told) == 1 and f"Skipped in '{root}', 8 in all" in str(told[0].message)
    for line in (
        "README.md: no task",
        "birds/val: neither train nor test",
        "train/list.csv: not in a class folder",
        "train/crow/.0.png: hidden",
        "train/crow/notes.txt: no image by its suffix '.txt'",
        "train/crow/0: no image by its suffix ''",
        "train/crow/more: a folder in a class folder",
        "test/.thumbnails: hidden",
    ):
        assert f"{line}\n" in f"{told[0].message}\n"
    assert (len(task.train), len(task.test)) == (9, 6)


def test_a_hundred_skipped_files_are_counted(root):
    for index in range(100):
        (root / "birds" / "train" / "owl" / f"{index}.xml").write_text("")
    with pytest.warns(UserWarning, match=r"(?s)100 in all.*and 90 more$"):
        load_folders(root, progress=False)


def test_an_image_by_any_other_suffix(root):
    """Pillow goes by the content, and so does whoever trains on it."""
    write(root / "birds" / "train" / "owl" / "0.jpg", 120, "PNG")
    assert len(load(root).train) == 10


# what is refused, before anything is trained -------------------------------------------------------------------------


def png_of(width: int, height: int) -> bytes:
    """A few bytes that say they are an image of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:900])


def outside_of_its_range(path):
    Image.fromarray(np.full((4, 4), 200, np.float32)).save(path, "TIFF")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b""), "cannot identify image file"),
        (lambda path: path.write_text("<html>not found</html>"), "cannot identify image file"),
        (truncated, "truncated"),
        (lambda path: path.write_bytes(png_of(40000, 40000)), "decompression bomb"),
        (outside_of_its_range, "mode F .* found 200 to 200"),
    ],
)
def test_images_that_can_not_be_used(root, damage, reason):
    damage(root / "birds" / "test" / "owl" / "1.png")
    with pytest.raises(ValueError, match=rf"(?s)1 of 15 images can't be read.*birds/test/owl/1\.png: .*{reason}"):
        load_folders(root, progress=False)
    with pytest.raises(ValueError, match=rf"(?s)1 of 6 images can't be read.*owl/1\.png: .*{reason}"):
        load_reference(str(root / "birds" / "test"))


def no_images(root):
    for path in (root / "birds" / "test" / "owl").iterdir():
        path.unlink()


def other_files_alone(root):
    no_images(root)
    (root / "birds" / "test" / "owl" / "1.jpeg.part").write_text("")


def in_one_split(root):
    write(root / "birds" / "train" / "eagle" / "0.png", 0)


def link_to_nowhere(root):
    (root / "birds" / "train" / "heron").symlink_to(root / "nowhere")


def image_link_to_nowhere(root):
    (root / "birds" / "train" / "owl" / "9.png").symlink_to(root / "nowhere.png")


def read_alike(root):
    write_task(root / "birds", **{"sea_gull": 1, "sea gull": 2})


def no_train(root):
    shutil.rmtree(root / "birds" / "train")


def no_text(root):
    write(Path(os.fsdecode(os.fsencode(root / "birds" / "train" / "owl") + b"/\xff.png")), 1)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (no_images, FileNotFoundError, r"(?s)Class folders without images; remove them.*birds/test/owl$"),
        (
            other_files_alone,
            FileNotFoundError,
            r"(?s)without images.*test/owl Skipped:.*no image by its suffix '.part'",
        ),
        (in_one_split, ValueError, r"'birds' has different classes.*Only in train: \['eagle'\]; only in test: \[\]"),
        (link_to_nowhere, ValueError, r"(?s)can't be read in '.*train'.*train/heron: a link that leads nowhere"),
        (image_link_to_nowhere, ValueError, r"(?s)can't be read.*train/owl/9\.png: a link that leads nowhere"),
        (read_alike, ValueError, r"read alike, since underscores stand for spaces: \['sea gull', 'sea_gull'\]"),
        (no_train, FileNotFoundError, r"No images in '.*birds/train': no such folder"),
        (no_text, ValueError, r"(?s)train/owl/\\udcff\.png: its name is no UTF-8"),
    ],
)
def test_folders_that_can_not_be_used(root, damage, error, message):
    damage(root)
    with pytest.raises(error, match=message):
        load_folders(root, progress=False)


# 16 bits, wherever images become RGB ---------------------------------------------------------------------------------


@pytest.fixture
def twins(tmp_path) -> list[Path]:
    """The same images with 8 bits, and with 16."""
    generator = np.random.default_rng(0)
    for index in range(12):
        pixels = generator.integers(0, 256, (24, 24), dtype=np.uint8)
        for bits in (8, 16):
            folder = tmp_path / f"{bits}" / "scans" / ("test" if index < 4 else "train") / "ab"[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            scaled = pixels if bits == 8 else pixels.astype(np.uint16) * 257
            Image.fromarray(scaled).save(folder / f"{index:02d}.png")
    return [tmp_path / "8", tmp_path / "16"]


def test_16_bits_in_batches(twins):
    eight, sixteen = map(load, twins)
    for mine, twin in zip(eight.train, sixteen.train, strict=True):
        assert twin["image"].mode == "RGB" and np.array_equal(mine["image"], twin["image"])
    drawn = []
    for task in (eight, sixteen):
        torch.manual_seed(0)
        training = train_batches(task.train, PROCESSOR, steps=2, batch_size=4, seed=0, crop_scale=0.5)
        batches = [*training, *eval_batches(task.test, PROCESSOR, batch_size=4)]
        drawn.append(torch.cat([batch["pixel_values"] for batch in batches]))
    assert torch.equal(*drawn) and drawn[0].std() > 0.1


def test_turned_tiffs(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.array([[0, 1, 127], [128, 200, 255]], np.uint8)
    Image.fromarray(pixels).save(root / "birds" / "train" / "owl" / "9.tif", exif=exif)
    image = load(root).train[-1]["image"]
    assert np.array_equal(np.asarray(image)[..., 0], np.rot90(pixels, k=-1))


def test_16_bits_in_the_comparison_of_merges_and_in_replay(twins):
    images, kept, losses = [], [], []
    for folder in twins:
        task = load(folder)
        clip, processor = small_clip(task.prompts("a {}."), image_size=16)
        images.append(load_images(task, clip, processor).test.tensors[0])
        settings = MethodSettings(exemplars=4, extra_batch_size=4, reference=str(folder / "scans" / "train"))
        icarl = METHODS["icarl"](clip, processor, settings)
        icarl.begin_task(task)
        icarl.end_task()
        kept.append(icarl.pixels_N3HW)
        torch.manual_seed(0)
        zscl = METHODS["zscl"](small_clip(task.prompts("a {}."), image_size=16)[0], processor, settings)
        zscl.begin_task(task)
        zscl.teacher.vision_model.post_layernorm.weight.data *= 2  # else there is nothing to distil
        batch = {"pixel_values": images[-1][:2], "labels": torch.tensor([0, 1])}
        losses.append(zscl.loss(zscl.model, batch).item())
    assert torch.equal(*images)
    assert torch.equal(*kept) and kept[0].float().std() > 10
    assert losses[0] == losses[1]


# the reference folder ------------------------------------------------------------------------------------------------


def test_a_reference_folder_is_listed_alike(root, tmp_path):
    folder = root / "birds" / "train"
    shutil.move(folder / "crow", tmp_path / "crow")
    (folder / "crow").symlink_to(tmp_path / "crow")
    write(folder / "__sea_eagle__" / "0.bmp", 7)
    (folder / "notes.txt").write_text("")
    with pytest.warns(UserWarning, match="notes.txt: not in a class folder"):
        reference = load_reference(str(folder))
    assert len(reference.images) == 10
    names = ("sea eagle", "crow", "gull", "owl")
    assert reference.sentences == [f"a photo of a {name}." for name in names]
    assert {round(np.asarray(row["image"]).mean()) for row in reference.images} == {7, 40, 120, 200}
    with pytest.raises(FileNotFoundError, match="No images in .*birds'"):
        load_reference(str(write_empty(tmp_path / "birds")))


def write_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


# worker processes ----------------------------------------------------------------------------------------------------


def test_workers_that_are_spawned(root):
    """As on macOS and Windows, behind Accelerate, in a process of its own: to what no worker gives."""
    code = f"""
import multiprocessing

import torch
from accelerate import Accelerator
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.data.batches import train_batches
from peft_moe_merge.mtil.data.folders import load_folders

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    (task,) = load_folders({str(root)!r}, progress=False)
    processor = CLIPImageProcessor(size={{"shortest_edge": 16}}, crop_size={{"height": 16, "width": 16}})
    options = {{"steps": 3, "batch_size": 4, "seed": 0, "crop_scale": 1.0}}
    spawned = Accelerator(cpu=True).prepare(train_batches(task.train, processor, num_workers=1, **options))
    for a, b in zip(train_batches(task.train, processor, **options), spawned, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        # every image is of one grey, wherever it is cropped
        torch.testing.assert_close(a["pixel_values"].mean((2, 3)), b["pixel_values"].mean((2, 3)))
    print("alike")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "alike\n", done.stderr


@pytest.mark.parametrize(("suite", "name"), [("digits", "digits_0_to_3"), ("mini", "colors")])
def test_what_workers_get_can_be_pickled(suite, name):
    """Data sets in memory, too."""
    (task,) = load_suite(suite, [name])
    training = train_batches(task.train, PROCESSOR, steps=2, batch_size=2, seed=0, crop_scale=1.0)
    testing = Accelerator(cpu=True).prepare(eval_batches(task.test, PROCESSOR, batch_size=2))
    for loader in (training, testing):
        rows, _, _ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        assert len(rows) == len(loader.dataset) and rows[1]["labels"] == loader.dataset[1]["labels"]
    assert torch.equal(rows[1]["pixel_values"], testing.dataset[1]["pixel_values"])


# photographs ---------------------------------------------------------------------------------------------------------


def test_photographs_have_the_labels_of_their_folders(real_images):
    """Counted and named by what the folders hold, in the order of their names."""
    for task in load_folders(real_images, progress=False):
        folder = real_images / task.name
        names = sorted(path.name for path in (folder / "train").iterdir())
        assert task.class_names == tuple(name.replace("_", " ") for name in names)
        for split in SPLITS:
            expected = [
                (str(file), label)
                for label, name in enumerate(names)
                for file in sorted((folder / split / name).iterdir())
            ]
            raw = getattr(task, split).cast_column("image", ImageFeature(decode=False))
            assert [(row["image"]["path"], row["label"]) for row in raw] == expected
