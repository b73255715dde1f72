"""Tasks from image folders: `<root>/<task>/<train|test>/<class>/*.jpg`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .listing import Listing, check_files, list_images, warn_of_skipped
from .task import Task
from .templates import templates_for

SPLITS = ("train", "test")


def load_folders(root: str | Path, tasks: Sequence[str] | None = None, *, progress: bool = True) -> list[Task]:
    """Load the tasks below a folder, after checking that every image can be read.

    Classes have the names of their folders in both splits, and labels by the order of these names. What is taken for an
    image, and for a class, is told by `list_images`; the rest is skipped, with a warning that lists it.

    Args:
        root: the folder of the stream, with one folder per task. Underscores in class folders stand for spaces.
        tasks: which tasks, in which order; all of them in alphabetical order if None.
        progress: show a bar while the images are checked.

    Raises:
        FileNotFoundError: no such folder or task, a folder without images, or a class without them.
        ValueError: a task with one class, different classes in train and test, two that read alike, links that lead
            nowhere, or images that can't be read or have no defined colours.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"No folder {str(root)!r}. Expected <root>/<task>/<train|test>/<class>/<images>.")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    found = [path.name for path in entries if any((path / split).is_dir() for split in SPLITS)]
    if not found:
        raise FileNotFoundError(
            f"{str(root)!r} holds no task. Expected <root>/<task>/<train|test>/<class>/<images>; found "
            f"{[path.name for path in entries][:10]}."
        )
    unknown = [task for task in tasks or () if task not in found]
    if unknown:
        raise FileNotFoundError(f"No task {', '.join(map(repr, unknown))} in {str(root)!r}. Tasks there: {found}.")
    stream = {name: {split: list_images(root / name / split) for split in SPLITS} for name in tasks or found}
    for name, splits in stream.items():
        _check_classes(name, splits)
    listings = [listing for splits in stream.values() for listing in splits.values()]
    skipped = [f"{path}: no task" for path in entries if tasks is None and path.name not in found]
    skipped += [
        f"{path}: neither {' nor '.join(SPLITS)}"
        for name in stream
        for path in sorted((root / name).iterdir())
        if path.name not in SPLITS
    ]
    warn_of_skipped(root, skipped + [path for listing in listings for path in listing.skipped])
    check_files([file for listing in listings for file in listing.files], progress=progress)
    return [
        Task(
            name=name,
            class_names=tuple(map(_plain_words, splits["train"].images)),
            templates=templates_for(name),
            **{split: listing.dataset(name, split) for split, listing in splits.items()},
        )
        for name, splits in stream.items()
    ]


def _plain_words(name: str) -> str:
    return name.replace("_", " ").strip() or name


def _check_classes(name: str, splits: dict[str, Listing]) -> None:
    train, test = (set(splits[split].images) for split in SPLITS)
    if train != test:
        raise ValueError(
            f"Task {name!r} has different classes to train and to test on. Only in train: "
            f"{sorted(train - test)}; only in test: {sorted(test - train)}."
        )
    if len(train) < 2:
        raise ValueError(
            f"Task {name!r} has one class, {train.pop()!r}: there is nothing to tell apart. Give it at least two."
        )
    words = Counter(map(_plain_words, train))
    alike = sorted(folder for folder in train if words[_plain_words(folder)] > 1)
    if alike:
        raise ValueError(
            f"Task {name!r} has class folders that read alike, since underscores stand for spaces: {alike}. Rename "
            "them, or make one of them."
        )
