"""Ways in which images go wrong, after Hendrycks and Dietterich (arXiv 1903.12261), on small images.

Each takes and returns `[N, 3, H, W]` in [0, 1]. Strengths are meant for images of 32 to 64 pixels, where they should
hurt about as much as severity 5 of the original does at 224.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.io import decode_jpeg, encode_jpeg
from transformers import BaseImageProcessor

Corruption = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def motion(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A horizontal blur over a sixth of the width."""
    length = 2 * (x.shape[-1] // 12) + 1
    kernel = torch.full((3, 1, 1, length), 1 / length)
    return F.conv2d(F.pad(x, (length // 2, length // 2, 0, 0), mode="replicate"), kernel, groups=3)


def impulse(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Salt and pepper on 17 % of the pixels."""
    chance = torch.rand((len(x), 1, *x.shape[2:]), generator=generator)
    return torch.where(chance < 0.085, 0.0, torch.where(chance > 1 - 0.085, 1.0, x))


def gauss(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of standard deviation 0.2."""
    return (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def pixelate(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A third of the resolution."""
    small = F.interpolate(x, size=(x.shape[2] // 3, x.shape[3] // 3), mode="area")
    return F.interpolate(small, size=x.shape[2:], mode="nearest")


def contrast(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A fifth of the contrast."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + 0.2 * (x - mean)


def jpeg(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """JPEG at quality 8."""
    return torch.stack([decode_jpeg(encode_jpeg(image, quality=8)) for image in (255 * x).byte()]) / 255


CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function for function in (motion, impulse, gauss, pixelate, contrast, jpeg)
}


def corrupt(images: TensorDataset, name: str, processor: BaseImageProcessor, seed: int = 0) -> TensorDataset:
    """Corrupt preprocessed images: the normalisation is undone before and done again after.

    Args:
        images: pixel values and labels.
        name: a key of `CORRUPTIONS`.
        processor: the image processor that they went through.
        seed: of the noise.
    """
    pixels, labels = images.tensors
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    generator = torch.Generator().manual_seed(seed)
    corrupted = CORRUPTIONS[name]((pixels * std + mean).clamp(0, 1), generator)
    return TensorDataset((corrupted - mean) / std, labels)
