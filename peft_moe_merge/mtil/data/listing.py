"""What a folder of class folders holds: listed once, for checking and for loading alike."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetInfo, Features, NamedSplit
from PIL import Image as PILImage
from tqdm import tqdm

from .defects import defect, listed
from .rgb import RGBImage


@dataclass(frozen=True)
class Listing:
    """The images of `<folder>/<class>/<images>`.

    Attributes:
        folder: that was listed.
        images: files by class, both sorted. A class is called as its folder is, whatever that is; links are followed.
        skipped: everything else, and why.
    """

    folder: Path
    images: dict[str, list[Path]]
    skipped: list[str]

    @property
    def files(self) -> list[Path]:
        """All images, in the order of the rows of `dataset`."""
        return [file for files in self.images.values() for file in files]

    def dataset(self, name: str, split: str) -> Dataset:
        """Rows with `image` (RGB), which stays where it is until a row is read, and `label`, the class's position."""
        features = Features({"image": RGBImage(), "label": ClassLabel(names=list(self.images))})
        labels = [label for label, files in enumerate(self.images.values()) for _ in files]
        columns = {"image": [str(file.absolute()) for file in self.files], "label": labels}
        info = DatasetInfo(dataset_name=name, features=features)
        return Dataset.from_dict(columns, features=features, info=info, split=NamedSplit(split))


def list_images(folder: Path) -> Listing:
    """List the images of a folder of class folders.

    A class is a folder, or a link to one, without a dot in front of its name; an image is a file in it without a dot in
    front of its name and with one of the suffixes that Pillow opens. All else is skipped; `warn_of_skipped` tells it. Names
    are compared in Unicode's composed form, since some systems store accents apart.

    Raises:
        FileNotFoundError: no such folder, no images, or a class without images.
        ValueError: links that lead nowhere, or names that are no text.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"No images in {str(folder)!r}: no such folder. Expected {folder!s}/<class>/<images>.")
    opened = {suffix for suffix, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    images: dict[str, list[Path]] = {}
    skipped: list[str] = []
    for path in _entries(folder, skipped):
        if not path.is_dir():
            skipped.append(f"{path}: not in a class folder")
            continue
        files = images.setdefault(unicodedata.normalize("NFC", path.name), [])
        for file in _entries(path, skipped):
            if file.is_dir():
                skipped.append(f"{file}: a folder in a class folder")
            elif file.suffix.lower() not in opened:
                skipped.append(f"{file}: no image by its suffix {file.suffix!r}")
            else:
                files.append(file)
    empty = [str(folder / name) for name, files in images.items() if not files]
    because = f" Skipped:\n  {listed(skipped)}" if skipped else ""
    if len(empty) == len(images):
        raise FileNotFoundError(f"No images in {str(folder)!r}. Expected {folder!s}/<class>/<images>.{because}")
    if empty:
        raise FileNotFoundError(f"Class folders without images; remove them, or add some:\n  {listed(empty)}{because}")
    return Listing(folder, dict(sorted(images.items())), skipped)


def _entries(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """What is in a folder, but hidden files and folders, in the order of their names."""
    broken = []
    for path in sorted(folder.iterdir()):
        printed = str(path).encode(errors="backslashreplace").decode()
        if path.name.startswith("."):
            skipped.append(f"{printed}: hidden")
        elif printed != str(path):
            broken.append(f"{printed}: its name is no UTF-8")
        elif not path.exists():
            broken.append(f"{printed}: a link that leads nowhere")
        else:
            yield path
    if broken:
        raise ValueError(f"Mend or remove what can't be read in {str(folder)!r}:\n  {listed(broken)}")


def warn_of_skipped(root: Path, skipped: list[str]) -> None:
    """Say what is taken for no image, and why."""
    if skipped:
        warnings.warn(f"Skipped in {str(root)!r}, {len(skipped)} in all:\n  {listed(skipped)}", stacklevel=3)


def check_files(files: Iterable[Path], *, progress: bool = True) -> None:
    """Decode images, with a bar.

    Raises:
        ValueError: some can't be read, or have no defined colours; each with the reason.
    """
    files = list(files)
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(defect, files), total=len(files), desc="checking images", leave=False, disable=not progress
        )
        defects = [f"{file}: {error}" for file, error in zip(files, bar, strict=True) if error]
    if defects:
        raise ValueError(
            f"{len(defects)} of {len(files)} images can't be read; replace or remove them:\n  {listed(defects)}"
        )
