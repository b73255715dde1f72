"""A task's logits from a batch of it.

Shapes: B images, C classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .batches import images_of


def zero_shot_logits(model: nn.Module, pixel_values: torch.Tensor, head_CD: torch.Tensor) -> torch.Tensor:
    """Return a CLIP's `logits_BC` for images and classes given by their normalised text features."""
    features_BD = F.normalize(model.get_image_features(pixel_values=pixel_values).pooler_output, dim=-1)
    return model.logit_scale.exp() * features_BD @ head_CD.T.to(features_BD)


def task_logits(model: nn.Module, batch: Any, head_CD: torch.Tensor | None = None) -> torch.Tensor:
    """Return `logits_BC` for a batch from a data loader, moved to the model's device.

    Args:
        model: a CLIP, or without `head_CD` any model whose output has `logits_per_image` or `logits`.
        batch: with `head_CD` pixel values, alone, first in a tuple, or by that name; without, the model's arguments.
            Labels are not looked at.
        head_CD: the normalised text features of the task's classes.

    Raises:
        ValueError: no head, and the batch is not a mapping.
    """
    device = next(model.parameters()).device
    if head_CD is not None:
        return zero_shot_logits(model, images_of(batch).to(device), head_CD)
    if not isinstance(batch, Mapping):
        raise ValueError(f"without `heads` a batch is a mapping of the model's arguments, got {type(batch).__name__}.")
    output = model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})
    return output.logits_per_image if "logits_per_image" in output else output.logits
