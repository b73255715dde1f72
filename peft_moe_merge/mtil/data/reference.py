"""Images and sentences beside the stream, by which a method can see what CLIP knew."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from .hub.load import load_reference_images
from .hub.table import REFERENCE, class_names
from .listing import check_files, list_images, warn_of_skipped
from .mini.drawings import draw_images, pair_table

_DRAWINGS, _SEED = 4, 1  # drawings per concept and style; the small CLIP was pretrained with those of seed 0


@dataclass(frozen=True)
class Reference:
    """Images, and sentences that need not describe them.

    Attributes:
        images: rows with `image` (PIL, of any mode).
        sentences: what may be said of images.
    """

    images: Dataset
    sentences: list[str]


@functools.cache
def load_reference(source: str) -> Reference:
    """Load a reference set.

    Args:
        source: "mini" draws one, other drawings of the concepts that the small CLIP was pretrained on and in those
            styles; the embedded tasks have the same concepts, but none of the styles. "tiny_imagenet" comes from the
            Hub. Any other is a folder `<source>/<class>/<images>`. Their class names become the sentences.

    Raises:
        FileNotFoundError: no such folder, one without images, or a class without them.
        ValueError: images that can't be read; see `list_images` and `check_files`.
        OSError, ValueError: the Hub's set can't be had; see `load_hub_task`.
    """
    if source == REFERENCE:
        return Reference(load_reference_images(), [f"a photo of a {name}." for name in class_names(REFERENCE)])
    if source == "mini":
        pairs = pair_table(_DRAWINGS)
        drawings = [PILImage.fromarray(pixels) for pixels in draw_images(pairs, _SEED)]
        images = Dataset.from_dict({"image": drawings}, features=Features({"image": Image()}))
        return Reference(images, sorted({caption for pair in pairs for caption in pair.captions}))
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No reference images in {source!r}. Expected {source}/<class>/<images>, 'mini' for drawings, or "
            f"{REFERENCE!r} for that set from the Hub."
        )
    listing = list_images(folder)
    warn_of_skipped(folder, listing.skipped)
    check_files(listing.files)
    sentences = [f"a photo of a {name.replace('_', ' ').strip() or name}." for name in listing.images]
    return Reference(listing.dataset(folder.name, "reference"), sentences)
