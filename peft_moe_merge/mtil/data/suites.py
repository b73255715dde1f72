"""Streams by name: which tasks, in which order, with how many images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from datasets import Dataset
from tqdm import tqdm

from .digits import load_digit_tasks
from .folders import load_folders
from .hub.load import load_hub_task
from .hub.table import HUB_SETS, ORDER_II
from .mini import TASKS, load_task
from .task import Task, labels_of

MINI_ORDER_II = (
    "vehicles",
    "flowers",
    "digits",
    "food",
    "scenes",
    "textures",
    "aerial",
    "animals",
    "shapes",
    "letters",
    "colors",
)
"""A second order of the embedded suite: neighbours of Order I, which is alphabetical, are apart."""

SECOND_ORDERS = {"mini": MINI_ORDER_II, "mtil": ORDER_II}


def load_suite(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    order: str = "I",
    few_shot: int | None = None,
    seed: int = 0,
    progress: bool = True,
    data_dir: str | None = None,
    allow_size_mismatch: bool = False,
) -> list[Task]:
    """Load a stream.

    Args:
        suite: "mini" (the embedded benchmark), "digits" (scikit-learn's, three small tasks), "mtil" (the benchmark's
            11 data sets from the Hub) or a folder of tasks.
        tasks: which tasks, in which order; if given, `order` does not count.
        order: "I" (alphabetical), "II" (a second fixed one, of "mini" and "mtil") or "random" (by the seed).
        few_shot: training images per class; None takes all. With "mtil" it also chooses the tasks' learning rates.
        seed: of a random order and of the few images taken.
        progress: show bars.
        data_dir, allow_size_mismatch: of "mtil"; see `load_hub_task`.

    Raises:
        ValueError: an unknown task or order, or a class with fewer images than `few_shot`.
        FileNotFoundError: no such folder.
        OSError, ValueError: a data set can't be loaded, or is not what it should be; see `load_hub_task`.
    """
    if order not in ("I", "random") and (order != "II" or suite not in SECOND_ORDERS):
        raise ValueError(
            f"No order {order!r} of the suite {suite!r}: 'I', 'random', and 'II' of {' and '.join(SECOND_ORDERS)}."
        )
    if suite == "mini":
        stream = [_mini_task(name) for name in _chosen(tasks, list(TASKS), "mini")]
    elif suite == "digits":
        available = {task.name: task for task in load_digit_tasks()}
        stream = [available[name] for name in _chosen(tasks, list(available), "digits")]
    elif suite == "mtil":
        names = tqdm(_chosen(tasks, list(HUB_SETS), "mtil"), desc="loading", leave=False, disable=not progress)
        options = {"data_dir": data_dir, "allow_size_mismatch": allow_size_mismatch, "few_shot": few_shot is not None}
        stream = [load_hub_task(name, **options) for name in names]
    else:
        stream = load_folders(suite, tasks, progress=progress)
    if tasks is None:
        stream = _ordered(stream, suite, order, seed)
    if few_shot is not None:
        stream = [replace(task, train=_few(task, few_shot, seed)) for task in stream]
    return stream


def _mini_task(name: str) -> Task:
    task = TASKS[name]
    return Task(name, task.classes, task.templates, load_task(name, "train"), load_task(name, "test"))


def _chosen(tasks: Sequence[str] | None, available: list[str], suite: str) -> list[str]:
    unknown = [name for name in tasks or () if name not in available]
    if unknown:
        raise ValueError(f"The suite {suite!r} has no task {', '.join(map(repr, unknown))}. Tasks: {available}.")
    return list(tasks or available)


def _ordered(stream: list[Task], suite: str, order: str, seed: int) -> list[Task]:
    if order == "I":
        return sorted(stream, key=lambda task: task.name)
    if order == "random":
        return [stream[position] for position in np.random.default_rng(seed).permutation(len(stream))]
    return sorted(stream, key=lambda task: SECOND_ORDERS[suite].index(task.name))


def _few(task: Task, few_shot: int, seed: int) -> Dataset:
    labels = labels_of(task.train)
    generator, rows = np.random.default_rng(seed), []
    for label, name in enumerate(task.class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < few_shot:
            raise ValueError(f"Task {task.name!r} has {len(members)} images of {name!r}; few_shot={few_shot} is more.")
        rows.extend(sorted(generator.permutation(members)[:few_shot].tolist()))
    return task.train.select(rows)
