"""Images that can't be read: which they are, and how to list them."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from PIL import Image


def defect(file: str | Path | BinaryIO) -> Exception | None:
    """Decode an image, and return what is wrong with it, if anything."""
    try:
        with Image.open(file) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise whatever they meet
        return error
    return None


def listed(defects: list[str]) -> str:
    """List the first ten, a line each, and say how many more there are."""
    more = f"\n  and {len(defects) - 10} more" if len(defects) > 10 else ""
    return "\n  ".join(defects[:10]) + more
