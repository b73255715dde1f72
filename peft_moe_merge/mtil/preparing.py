"""Training with what Accelerate prepares, which afterwards is as it was: it can be prepared again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn


@contextmanager
def prepared(accelerator: Accelerator, model: nn.Module, *others: Any) -> Iterator[tuple[Any, ...]]:
    """Prepare a model, and its optimizer and batches, for the time of a `with` block.

    Then the model has no wrapper, no mixed precision and no mark any more. Accelerate leaves a model with that mark alone, so one
    that is prepared anew for each task would be trained without mixed precision from the second on. The scale of the losses in
    float16 is that of before, too: each training starts alike, whatever there was before it.

    Yields:
        What takes the places of `model` and `others`.
    """
    scale = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    ready = accelerator.prepare(model, *others)
    try:
        yield ready
    finally:
        plain = accelerator.unwrap_model(ready[0], keep_fp32_wrapper=False)
        plain.__dict__.pop("_is_accelerate_prepared", None)
        accelerator.free_memory()
        if scale is not None:
            accelerator.scaler.load_state_dict(scale)
