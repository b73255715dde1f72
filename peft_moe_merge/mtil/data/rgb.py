"""An image column whose rows are RGB, whatever the mode of the files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from datasets import Image
from PIL import Image as PILImage

from peft_moe_merge.inference.rgb import to_rgb


class RGBImage(Image):
    """`datasets.Image`, read by `to_rgb` in place of `Image(mode="RGB")`, which turns images of 16 bits white."""

    def decode_example(
        self, value: str | dict | PILImage.Image, token_per_repo_id: dict[str, Any] | None = None
    ) -> PILImage.Image:
        if isinstance(value, dict) and value["bytes"] is None and os.path.isfile(value["path"] or ""):
            value = {**value, "bytes": Path(value["path"]).read_bytes()}  # for the same reason as `load_rgb`
        return to_rgb(super().decode_example(value, token_per_repo_id))
