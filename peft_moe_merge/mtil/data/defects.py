"""Images that can't be read: which they are, and how to list them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image
from PIL import Image as PILImage

from peft_moe_merge.inference.rgb import to_rgb

_ROWS = 1000  # looked at together, whatever size the images have


def defect(file: str | Path | BinaryIO) -> Exception | None:
    """Decode an image and make it RGB, and return what is wrong with it, if anything."""
    try:
        with open(file, "rb") if isinstance(file, (str, Path)) else file as content, PILImage.open(content) as image:
            to_rgb(image)
    except Exception as error:  # Pillow's readers raise whatever they meet
        return error
    return None


def null_rows(dataset: Dataset, column: str = "image") -> list[int]:
    """Find the rows without an image, or with one of no bytes; nothing is decoded."""
    encoded = isinstance(dataset.features[column], Image)
    raw = dataset.select_columns(column).with_format("arrow")
    rows = []
    for start in range(0, len(raw), _ROWS):
        images = raw[start : start + _ROWS][column]
        absent = pc.is_null(images)
        if encoded:
            content, path = pc.struct_field(images, "bytes"), pc.struct_field(images, "path")
            absent = pc.if_else(pc.is_null(content), pc.is_null(path), pc.equal(pc.binary_length(content), 0))
        rows += (start + np.flatnonzero(absent.to_numpy())).tolist()
    return rows


def refuse_null_images(name: str, split: str, dataset: Dataset, column: str = "image") -> None:
    """Raise a ValueError that names data set, split and rows, if rows have no image."""
    rows = null_rows(dataset, column)
    if rows:
        more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
        raise ValueError(
            f"{name!r}, split {split!r}: no image in {len(rows)} of {len(dataset)} rows: "
            f"{', '.join(map(str, rows[:10]))}{more}. Remove these rows, e.g. by `dataset.select`."
        )


def listed(defects: list[str]) -> str:
    """List the first ten, a line each, and say how many more there are."""
    more = f"\n  and {len(defects) - 10} more" if len(defects) > 10 else ""
    return "\n  ".join(defects[:10]) + more
