"""What is settled before merges are compared: which tasks enter, and how fast each method adapts.

Neither looks at a test image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset
from transformers import CLIPModel, CLIPProcessor

from ..data.task import Task
from ..results import write_results
from .finetune import accuracy
from .images import load_images
from .study import Run, merged_by

LADDER = tuple(float(f"{digit}e{exponent}") for exponent in range(-6, 1) for digit in (1, 3))
"""Rates to choose from."""


def times_chance(tasks: Sequence[Task], clip: CLIPModel, processor: CLIPProcessor) -> dict[str, float]:
    """Return, for each task, how many times chance zero-shot accuracy on its training images is.

    Merges that adapt without labels can only sharpen what a CLIP knows of the classes; a task enters a comparison where
    this is at least 2.
    """
    found = {}
    for task in tasks:
        images = load_images(task, clip, processor)
        found[task.name] = accuracy(clip, images.finetune, images.head_CD) / 100 * len(task.class_names)
    return found


def halves(images: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    """Divide images, which are in random order, into two halves."""
    middle = (len(images) + 1) // 2
    return TensorDataset(*images[:middle]), TensorDataset(*images[middle:])


def best_rate(rates: Sequence[float], value: Callable[[float], float]) -> float:
    """Return the rate of the highest value, the smaller one of equals.

    Args:
        rates: a part of `LADDER` without gaps. Where the best is at its edge it grows, for no method should lose by where
            a grid ends.
        value: of a rate; it may be asked again.
    """
    low, high = LADDER.index(rates[0]), LADDER.index(rates[-1])
    while True:
        best = max(range(low, high + 1), key=lambda place: value(LADDER[place]))
        if best == high < len(LADDER) - 1:
            high += 1
        elif best == low > 0:
            low -= 1
        else:
            return LADDER[best]


def choose_rates(run: Run, methods: Sequence[str], rates: Sequence[float], file: Path) -> dict[str, float]:
    """Choose how fast each method adapts: by accuracy on half of the adaptation split, after adapting to the other half.

    For this, labels of held-out training images are looked at, for all methods alike.

    Args:
        run: fine-tuned models and their images.
        methods: that adapt.
        rates: the grid to begin with, see `best_rate`.
        file: where accuracies are written, `{method: {rate: %}}`; what is there already is not done again.

    Returns:
        For each method the rate with the best average over tasks, the smaller one of equals.
    """
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    parts = {task.name: halves(task.adapt) for task in run.tasks}
    adapting = replace(run, tasks=tuple(replace(task, adapt=parts[task.name][0]) for task in run.tasks))

    def known(method: str, rate: float) -> float:
        of_method = found.setdefault(method, {})
        if str(rate) not in of_method:
            at_rate = replace(adapting, settings=replace(run.settings, adapt_lrs=[f"{method}={rate}"]))
            model = merged_by(at_rate, method, at_rate.adaptation(method))
            each = [accuracy(model, parts[task.name][1], task.head_CD) for task in run.tasks]
            of_method[str(rate)] = sum(each) / len(each)
            write_results(file, found)
        return of_method[str(rate)]

    return {method: best_rate(rates, lambda rate, m=method: known(m, rate)) for method in methods}
