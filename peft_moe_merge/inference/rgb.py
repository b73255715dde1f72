"""Images of any mode as RGB, 8 bits: the one place where that is decided."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base as Tag

_WITHOUT_PREMULTIPLIED_ALPHA = {"La": "LA", "RGBa": "RGBA"}
_SIXTEEN_BITS = 2**16 - 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert as CLIP's own preprocessing does (`image.convert("RGB")`), but scale what has more than 8 bits.

    Pillow cuts off whatever is above 255, which turns images of 16 bits white. Here they are scaled by their range, to the
    nearest of 256 levels. Transparency is dropped, as CLIP's preprocessing drops it. An EXIF orientation is applied.

    Args:
        image: of any mode. Mode I must hold 16 bits, of which some are used; mode F numbers from 0 to 1.

    Raises:
        ValueError: an image of mode I or F whose range is not known.
    """
    image.load()
    # before it is turned, since only the image as read knows it
    top = 2**12 - 1 if _bits_per_sample(image) == 12 else _SIXTEEN_BITS
    if image.getexif().get(Tag.Orientation) is not None:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode in ("I", "F"):
        _check_range(image)
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.rint(np.asarray(image) * 255).astype(np.uint8)).convert("RGB")
    return image.convert(_WITHOUT_PREMULTIPLIED_ALPHA.get(image.mode, image.mode)).convert("RGB")


def load_rgb(source: Image.Image | str | Path) -> Image.Image:
    """Read an image from a file, an `http(s)` or a `data:` address, if it is not one yet, and convert it by `to_rgb`.

    Raises:
        ValueError: no such file, an image that is too large for Pillow, or see `to_rgb`; with the file or address.
        OSError: a file is no image, or an address can't be reached; with it.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    if not _is_address(source) and not Path(source).is_file():
        raise ValueError(f"No image file {str(source)!r}. Give a PIL image, a path, or an http(s) or data: address.")
    try:
        # from memory: Pillow maps some files by their names, and then mixes up the pixels of turned TIFFs
        return to_rgb(Image.open(BytesIO(_content(source))))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{str(source)[:200]!r}: {error}") from error


def _is_address(source: str | Path) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://", "data:image/"))


def _content(source: str | Path) -> bytes:
    if not _is_address(source):
        return Path(source).read_bytes()
    # some servers refuse Python's own name
    with urlopen(Request(source, headers={"User-Agent": "peft-moe-merge"}), timeout=60) as answer:
        return answer.read()


def _bits_per_sample(image: Image.Image) -> int | None:
    """A TIFF may have 12 bits in the mode of 16."""
    tags = getattr(image, "tag_v2", None)
    return tags.get(Tag.BitsPerSample, (None,))[0] if tags else None


def _check_range(image: Image.Image) -> None:
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F" and not (low >= 0 and high <= 1):  # not a number is neither
        raise ValueError(
            f"An image of mode F (floating point) must have values from 0 to 1, found {low:g} to {high:g}. "
            "Divide by its range, or save it with 8 or 16 bits."
        )
    # 16 bits as PGM, and as PNG in older releases of Pillow; nothing tells 8 bits stored wide from a nearly black image
    if image.mode == "I" and not (low >= 0 and (high == 0 or 255 < high <= _SIXTEEN_BITS)):
        raise ValueError(
            f"An image of mode I (32-bit integers) is taken for one of 16 bits, and must have its largest value "
            f"between 256 and {_SIXTEEN_BITS}, and none below 0; found {low} to {high}. Save it with 8 or 16 bits."
        )
