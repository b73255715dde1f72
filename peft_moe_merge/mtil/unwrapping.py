"""Models as they were before `accelerator.prepare`, so that they can be prepared again."""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn


def unwrapped(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Undo what `accelerator.prepare` did to a model: the wrapper of several processes, mixed precision, and the mark.

    Accelerate leaves a model with that mark alone, so one that is prepared anew for each task would be trained without mixed
    precision from the second on.
    """
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    plain.__dict__.pop("_is_accelerate_prepared", None)
    return plain
