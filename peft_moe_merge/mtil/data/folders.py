"""Tasks from image folders: `<root>/<task>/<train|test>/<class>/*.jpg`."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from tqdm import tqdm

from .defects import defect, listed
from .task import Task
from .templates import templates_for

SPLITS = ("train", "test")
IMAGE_SUFFIXES = frozenset(PILImage.registered_extensions())


def load_folders(root: str | Path, tasks: Sequence[str] | None = None, *, progress: bool = True) -> list[Task]:
    """Load the tasks below a folder, after checking that every image can be read.

    Args:
        root: the folder of the stream, with one folder per task. Underscores in class folders stand for spaces.
        tasks: which tasks, in which order; all of them in alphabetical order if None.
        progress: show a bar while the images are checked.

    Raises:
        FileNotFoundError: no such folder or task, or a folder without images.
        ValueError: a task with one class, different classes in train and test, or images that can't be read.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"No folder {str(root)!r}. Expected <root>/<task>/<train|test>/<class>/<images>.")
    found = sorted(path.name for path in root.iterdir() if (path / "train").is_dir())
    if not found:
        raise FileNotFoundError(
            f"{str(root)!r} holds no task. Expected <root>/<task>/<train|test>/<class>/<images>; found "
            f"{sorted(path.name for path in root.iterdir())[:10]}."
        )
    unknown = [task for task in tasks or () if task not in found]
    if unknown:
        raise FileNotFoundError(f"No task {', '.join(map(repr, unknown))} in {str(root)!r}. Tasks there: {found}.")
    names = list(tasks or found)
    files = {name: {split: _image_files(root / name / split) for split in SPLITS} for name in names}
    _check_classes(files)
    _check_images([path for splits in files.values() for paths in splits.values() for path in paths], progress)
    return [_load_task(root / name) for name in names]


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise FileNotFoundError(f"No images in {str(folder)!r}. Expected {folder!s}/<class>/<images>.")
    return files


def _check_classes(files: dict[str, dict[str, list[Path]]]) -> None:
    for name, splits in files.items():
        train, test = ({path.parent.name for path in splits[split]} for split in SPLITS)
        if train != test:
            raise ValueError(
                f"Task {name!r} has different classes to train and to test on. Only in train: "
                f"{sorted(train - test)}; only in test: {sorted(test - train)}."
            )
        if len(train) < 2:
            raise ValueError(
                f"Task {name!r} has one class, {train.pop()!r}: there is nothing to tell apart. Give it at least two."
            )


def _check_images(paths: list[Path], progress: bool) -> None:
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(defect, paths), total=len(paths), desc="checking images", leave=False, disable=not progress
        )
        defects = [f"{path}: {error}" for path, error in zip(paths, bar, strict=True) if error]
    if defects:
        raise ValueError(
            f"{len(defects)} of {len(paths)} images can't be read; replace or remove them:\n  {listed(defects)}"
        )


def _load_task(folder: Path) -> Task:
    def load(split: str) -> Dataset:
        # by pattern, not by `data_dir`: there, a class called "train" (CIFAR-100 has one) is taken for a split
        files = {"train": str(folder / split / "*" / "*")}
        dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=False)
        return dataset.cast_column("image", Image(mode="RGB"))

    train, test = load("train"), load("test")
    return Task(
        name=folder.name,
        class_names=tuple(name.replace("_", " ") for name in train.features["label"].names),
        templates=templates_for(folder.name),
        train=train,
        test=test,
    )
