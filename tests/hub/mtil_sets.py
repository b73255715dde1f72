"""Small copies of the benchmark's data sets, with the columns, splits, configurations and class names of the real ones.

The colour of an image tells its class, and labels are numbered in another order than the task's, so that a mistake in
mapping labels shows.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from hub.loopback import LoopbackHub
from PIL import Image as PILImage

from peft_moe_merge.mtil.data.hub.table import HUB_SETS, class_names

SPLITS = {
    "aircraft": ("train", "val", "test"),
    "caltech101": ("train", "test"),
    "dtd": ("train", "validation", "test"),
    "eurosat": ("train", "validation", "test"),
    "flowers": ("train", "validation", "test"),
    "food101": ("train", "validation"),
    "sun397": ("train", "validation", "test"),
}
EXTRA = {"cifar100": {"coarse_label": Value("int64")}, "oxford_pet": {"image_id": Value("string")}}
MODES = {
    "mnist": ("L", "I;16"),
    "caltech101": ("RGB", "L", "P", "I;16"),
    "food101": ("RGB", "CMYK"),
    "flowers": ("RGB", "RGBA"),
}


def names_in_the_copy(task: str) -> dict[str, int]:
    """Return what the copy on the Hub calls the classes -> their numbers in the task; -1 is left out."""
    names = {(others or (ours,))[0]: number for number, (ours, others) in enumerate(class_names(task).items())}
    if task == "mnist":
        return {str(number): number for number in range(10)}
    if task == "sun397":  # /c/church/outdoor, /a/abbey
        paths = {
            name: name.replace(" ", "_").replace("_indoor", "/indoor").replace("_outdoor", "/outdoor")
            for name in names
        }
        return {f"/{name[0]}/{path}": names[name] for name, path in paths.items()}
    if task in ("caltech101", "cifar100", "food101", "oxford_pet"):
        names = {name.replace(" ", "_").lower(): number for name, number in names.items()}
    return names | ({"background_google": -1} if task == "caltech101" else {})


def picture(number: int, mode: str = "RGB", size: int = 8) -> bytes:
    """Paint an image in the grey that stands for a class: n of up to 500 is n // 2, the upper half lighter if odd."""
    pixels = np.full((size, size), 2 + number // 2, np.uint8)
    pixels[: size // 2] += 40 * (number % 2)
    if mode == "I;16":
        pixels = pixels.astype(np.uint16) * 257
    image = PILImage.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert("RGB") if mode == "CMYK" else image).convert(mode).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    return buffer.getvalue()


def class_in(image: PILImage.Image) -> int:
    """Read the class off an image that `picture` painted."""
    grey = np.asarray(image) / 257 if image.mode == "I;16" else np.asarray(image.convert("RGB")).mean(axis=2)
    below, above = grey[-1].mean(), grey[0].mean()
    return 2 * round(below - 2) + int(above - below > 20)


def write_copy(folder: Path, task: str, images: int | dict[str, int] = 1) -> dict[str, Path]:
    """Write the files of a repository.

    Args:
        folder: where.
        task: which.
        images: per class and split; or all in all, by split.

    Returns:
        Path in the repository -> file.
    """
    entry, names = HUB_SETS[task], sorted(names_in_the_copy(task).items(), reverse=True)
    modes, splits = MODES.get(task, ("RGB",)), SPLITS.get(task, ("train", "test"))
    features = {
        entry.image: Image(),
        entry.label: ClassLabel(names=[name for name, _ in names]),
        **EXTRA.get(task, {}),
    }
    files = {}
    for split in splits:
        count = images[split] if isinstance(images, dict) else images * len(names)
        labels = [row % len(names) for row in range(count)]
        pictures = [picture(max(names[label][1], 0), modes[row % len(modes)]) for row, label in enumerate(labels)]
        columns = {entry.image: [{"bytes": picture, "path": None} for picture in pictures], entry.label: labels}
        columns |= {
            name: [0 if feature.dtype == "int64" else "x"] * count for name, feature in EXTRA.get(task, {}).items()
        }
        path = f"{entry.config or 'data'}/{split}-00000-of-00001.parquet"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict(columns, features=Features(features)).to_parquet(folder / path)
        files[path] = folder / path
    listed = "".join(f"  - split: {split}\n    path: {entry.config or 'data'}/{split}-*\n" for split in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {entry.config or 'default'}\n  data_files:\n{listed}---\n"
    )
    return {"README.md": folder / "README.md", **files}


def serve(hub: LoopbackHub, folder: Path, task: str, images: int | dict[str, int] = 1) -> None:
    """Put a copy on a Hub, under the data set's own name and commit."""
    publish(hub, task, write_copy(folder / task, task, images))


def publish(hub: LoopbackHub, task: str, files: Mapping[str, bytes | str | Path]) -> None:
    """Commit files to a data set's repository; the commit gets the id that the benchmark loads."""
    entry = HUB_SETS[task]
    made = hub.add_repo("dataset", entry.hub_id, files)
    repo = hub.repos["dataset", entry.hub_id]
    if entry.revision:
        repo.commits[entry.revision] = repo.commits.pop(made)
        repo.branches["main"] = entry.revision
