"""Images that a method keeps: eight bits per channel, of the size that the model takes."""

# N images

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BaseImageProcessor


def no_images(processor: BaseImageProcessor) -> Tensor:
    """Return a memory without images: 0 x 3 x H x W."""
    size = processor.crop_size or processor.size
    return torch.zeros(0, 3, size["height"], size["width"], dtype=torch.uint8)


def normalized(pixels_N3HW: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Turn kept images into what the model takes."""
    mean, std = _statistics(processor)
    return (pixels_N3HW.float() * processor.rescale_factor - mean) / std


def in_bytes(pixel_values: Tensor, processor: BaseImageProcessor) -> Tensor:
    """Turn what the model takes into images to keep, rounded: what `normalized` gives back is half a step of 256 away at most."""
    mean, std = _statistics(processor)
    return ((pixel_values.float() * std + mean) / processor.rescale_factor).round().clamp(0, 255).to(torch.uint8)


def _statistics(processor: BaseImageProcessor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
    return mean, std
