"""One interface for all static merges."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from peft_moe_merge.model_merging.finetuned import Finetuned, load_task_vectors
from peft_moe_merge.model_merging.orthogonal import orthogonal

from .registry import STATIC_MERGES


def merge_static(
    base: nn.Module,
    finetuned: Mapping[str, Finetuned] | Iterable[tuple[str, Finetuned]],
    method: str = "task_arithmetic",
    without_interference: bool = False,
    **options: Any,
) -> nn.Module:
    """Merge fine-tuned copies of `base` into one model of the same architecture.

    Args:
        base: the pretrained model; it is not changed.
        finetuned: as in `merge_finetuned`.
        method: a key of `STATIC_MERGES`.
        without_interference: give the method the tasks' orthogonal parts, whose sum is TSV-merge, in place of task vectors.
        **options: of the method. `fisher`, `regmean` and `adamerging` need `batches`, images of each task.

    Returns:
        A copy of `base` with merged weights, in eval mode.

    Raises:
        ValueError: an unknown method, an option that it lacks or does not have, data missing for a task, or fine-tuned
            models that do not fit (see `merge_finetuned`).
    """
    if method not in STATIC_MERGES:
        raise ValueError(f"there is no static merge {method!r}; choose one of {list(STATIC_MERGES)}.")
    merge = STATIC_MERGES[method]
    unknown = [] if merge.takes_others else sorted(options.keys() - merge.options.keys())
    lacking = [
        name for name, option in merge.options.items() if option.default is option.empty and name not in options
    ]
    if unknown or lacking:
        raise ValueError(
            f"{method!r} has the options {list(merge.options)}"
            + (f"; {unknown} are not among them" if unknown else "")
            + (f"; {lacking} must be given" if lacking else "")
            + "."
        )
    vectors = load_task_vectors(base, finetuned)
    if without_interference:
        vectors = orthogonal(vectors)
    for name in {"batches", "heads"} & set(options):
        if missing := [task for task in vectors.tasks if task not in options[name]]:
            raise ValueError(f"`{name}` lacks the tasks {missing}; it has {list(options[name])}.")
    merged = copy.deepcopy(base).eval()
    values = merge(base, vectors, **options)
    with torch.no_grad():
        for name, parameter in merged.named_parameters(remove_duplicate=False):
            if name in values:
                parameter.copy_(values[name])
    return merged
