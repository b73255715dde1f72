"""Where a selector's features come from: always the frozen network, never the adapted one.

Shapes: B images, L tokens, D width of the vision tower, P projection width, F features.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.modeling_clip import CLIPVisionModel


@dataclass(frozen=True)
class FeatureSource(ABC):
    """Turns images into features."""

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, clip: nn.Module, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Compute features B x F of preprocessed images.

        Args:
            clip: a CLIP model, or its vision tower, that runs without experts.
            pixel_values: B x 3 x H x W, as CLIP's image processor makes them.
            interpolate_pos_encoding: as in CLIP's own forward.
        """

    def to_dict(self) -> dict[str, Any]:
        """Return what `source_from_dict` makes an equal source from."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class ImageFeatures(FeatureSource):
    """CLIP's own projected image features, in a full pass of the frozen model. Their root mean square is 1."""

    kind: ClassVar[str] = "image_features"

    def __call__(self, clip: nn.Module, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        projection = getattr(clip, "visual_projection", None)
        if projection is None:
            raise TypeError(f"A {type(clip).__name__} has no projected image features: select by `PatchTokens()`.")
        tower = vision_tower(clip)
        pooled_BD = tower(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding).pooler_output
        features_BP = F.normalize(projection(pooled_BD).float(), dim=-1)
        return features_BP * features_BP.shape[1] ** 0.5


@dataclass(frozen=True)
class PatchTokens(FeatureSource):
    """Mean and standard deviation over the patch tokens after the first blocks: B x 2D, without running the rest.

    In a tower of 12 blocks `depth` costs about `depth / 12` of a pass.
    """

    kind: ClassVar[str] = "patch_tokens"
    depth: int = 2

    def __post_init__(self):
        if self.depth < 0:
            raise ValueError(f"`depth` counts blocks, at least 0; got {self.depth}.")

    def __call__(self, clip: nn.Module, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        return Depths((self.depth,), ("mean", "deviation"))(clip, pixel_values, interpolate_pos_encoding)


@dataclass(frozen=True)
class Depths(FeatureSource):
    """Tokens after several blocks side by side, in one pass that stops at the deepest: B x (depths x tokens x D).

    Args:
        depths: after how many blocks, ascending.
        tokens: what is taken there: "class" is the class token, "mean" and "deviation" are those over the patch tokens.
    """

    kind: ClassVar[str] = "depths"
    depths: tuple[int, ...] = (2, 4)
    tokens: tuple[str, ...] = ("class", "mean")

    def __post_init__(self):
        for name in ("depths", "tokens"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if not self.depths or list(self.depths) != sorted(set(self.depths)) or self.depths[0] < 0:
            raise ValueError(f"`depths` counts blocks, each at least 0, ascending; got {self.depths}.")
        if not self.tokens or len(set(self.tokens)) < len(self.tokens) or not set(self.tokens) <= TOKENS.keys():
            raise ValueError(f"`tokens` must be different ones of {list(TOKENS)}, got {self.tokens}.")

    def __call__(self, clip: nn.Module, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        parts = []
        for x_BLD in self._hidden(vision_tower(clip), pixel_values, interpolate_pos_encoding):
            x_BLD = x_BLD.float()
            parts += [TOKENS[token](x_BLD) for token in self.tokens]
        return torch.cat(parts, dim=1)

    def _hidden(
        self, tower: CLIPVisionModel, pixel_values: Tensor, interpolate_pos_encoding: bool
    ) -> Iterator[Tensor]:
        blocks = tower.encoder.layers
        if self.depths[-1] > len(blocks):
            raise ValueError(f"depth={self.depths[-1]}, but the vision tower has {len(blocks)} blocks.")
        embedded_BLD = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        x_BLD = tower.pre_layrnorm(embedded_BLD)
        for depth in range(self.depths[-1] + 1):
            if depth:
                x_BLD = blocks[depth - 1](x_BLD, attention_mask=None)
            if depth in self.depths:
                yield x_BLD


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "class": lambda x_BLD: x_BLD[:, 0],
    "mean": lambda x_BLD: x_BLD[:, 1:].mean(dim=1),
    "deviation": lambda x_BLD: x_BLD[:, 1:].std(dim=1, correction=0),
}
"""What can be taken from hidden states."""


@dataclass(frozen=True)
class AlexNetFeatures(FeatureSource):
    """Output of AlexNet's last convolution, 256 x 13 x 13, as in the paper: B x 43264. A second backbone.

    Args:
        weights: a safetensors file with the weights of torchvision's AlexNet. None leaves them random, with a warning.
    """

    kind: ClassVar[str] = "alexnet"
    weights: str | None = None

    def __call__(self, clip: nn.Module, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        def column(values: list[float]) -> Tensor:
            return pixel_values.new_tensor(values)[:, None, None]

        images = pixel_values * column(OPENAI_CLIP_STD) + column(OPENAI_CLIP_MEAN)
        images = F.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
        images = (images - column(IMAGENET_DEFAULT_MEAN)) / column(IMAGENET_DEFAULT_STD)
        return self._network.to(images.device)(images.float()).flatten(1)

    @cached_property
    def _network(self) -> nn.Sequential:
        from torchvision.models import alexnet  # only who wants this backbone needs torchvision

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = alexnet(weights=None)
        if self.weights is None:
            warnings.warn(
                "AlexNetFeatures without `weights`: the network is random. Pass a safetensors file with the weights "
                "of torchvision's AlexNet (`safetensors.torch.save_file(alexnet(weights=...).state_dict(), path)`).",
                stacklevel=3,
            )
        else:
            network.load_state_dict(load_file(self.weights))
        return network.features[:11].eval().requires_grad_(False)


SOURCES: dict[str, type[FeatureSource]] = {
    source.kind: source for source in (ImageFeatures, PatchTokens, Depths, AlexNetFeatures)
}


def source_from_dict(values: dict[str, Any]) -> FeatureSource:
    """Make a source from what `to_dict` returned.

    Raises:
        ValueError: no such kind of source, or one with other settings.
    """
    kind = values.get("kind")
    if kind not in SOURCES:
        raise ValueError(f"Unknown feature source {kind!r}; there are {list(SOURCES)}.")
    try:
        return SOURCES[kind](**{name: value for name, value in values.items() if name != "kind"})
    except TypeError as error:
        raise ValueError(f"Bad settings of the feature source {kind!r}: {error}.") from error


def vision_tower(clip: nn.Module) -> CLIPVisionModel:
    """Find CLIP's vision tower.

    Raises:
        TypeError: there is none.
    """
    tower = getattr(clip, "vision_model", clip)
    if not isinstance(tower, CLIPVisionModel):
        raise TypeError(
            f"Selecting tasks by image needs the vision tower of a CLIP; a {type(clip).__name__} has none."
        )
    return tower
