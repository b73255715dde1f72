"""Streams by name: which tasks, in which order, with how many images.

A suite is a file in this folder. Any other name is that of a folder `<root>/<task>/<train|test>/<class>/<images>`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from peft_moe_merge.registry import discover

from ...settings import check_at_least, setting
from ..folders import load_folders
from ..task import Task, labels_of
from .base import Suite

SUITES: dict[str, type[Suite]] = discover(sys.modules[__name__], Suite)
"""By name."""

MINI_ORDER_II = SUITES["mini"].second_order


@dataclass
class DataSettings:
    """What is learnt.

    Raises:
        ValueError: an order that the suite does not have, or a number out of range.
    """

    suite: str = setting(
        "mini", "'mini', the embedded benchmark; 'digits'; 'mtil', from the Hub; or a folder of tasks"
    )
    tasks: list[str] | None = setting(None, "which tasks of the suite, in which order; default: all")
    order: Literal["I", "II", "random"] = setting(
        "I", "of the tasks: alphabetical, a second fixed one (of suites that have it), or random; --tasks has its own"
    )
    order_seed: int = setting(42, "of a random order, which is that of all seeds")
    few_shot: int | None = setting(None, "training images per class, others for each seed; default: all")
    data_dir: str | None = setting(None, "mtil: folder with local copies, <data_dir>/<task>, in place of the Hub")
    allow_size_mismatch: bool = setting(False, "mtil: go on with other numbers of images than the benchmark's")

    def __post_init__(self):
        suite = SUITES.get(self.suite)
        if self.order not in ("I", "random") and (self.order != "II" or not (suite and suite.second_order)):
            seconds = " and ".join(name for name, suite in SUITES.items() if suite.second_order)
            raise ValueError(
                f"No order {self.order!r} of the suite {self.suite!r}: 'I', 'random', and 'II' of {seconds}."
            )
        check_at_least(self, 1, "few_shot")

    def load(self, progress: bool = True) -> list[Task]:
        """Load the stream, in its order, with all images.

        With `few_shot`, tasks of the Hub get the learning rates for few images.

        Raises:
            ValueError: an unknown task.
            FileNotFoundError: no such folder.
            OSError, ValueError: a data set can't be loaded, or is not what it should be; see `load_hub_task`.
        """
        if self.suite in SUITES:
            stream = SUITES[self.suite]().load(self.tasks, self, progress)
        else:
            stream = load_folders(self.suite, self.tasks, progress=progress)
        return stream if self.tasks else self._ordered(stream)

    def _ordered(self, stream: list[Task]) -> list[Task]:
        if self.order == "II":
            return sorted(stream, key=lambda task: SUITES[self.suite].second_order.index(task.name))
        if self.order == "random":
            return [stream[position] for position in np.random.default_rng(self.order_seed).permutation(len(stream))]
        return sorted(stream, key=lambda task: task.name)

    def draw(self, stream: Sequence[Task], seed: int) -> list[Task]:
        """Take the few training images per class of a seed, or all if `few_shot` is None.

        Raises:
            ValueError: a class has fewer images than `few_shot`.
        """
        if self.few_shot is None:
            return list(stream)
        return [replace(task, train=_few(task, self.few_shot, seed)) for task in stream]


def load_suite(
    suite: str,
    tasks: Sequence[str] | None = None,
    *,
    few_shot: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> list[Task]:
    """Load a stream in one call; see `DataSettings`, of which the arguments and `options` are.

    Args:
        suite: a key of `SUITES`, or a folder of tasks.
        tasks: which tasks, in which order; if given, `order` does not count.
        few_shot: training images per class; None takes all. With "mtil" it also chooses the tasks' learning rates.
        seed: of a random order and of the few images taken.
        progress: show bars.
        **options: `order`; of "mtil" `data_dir` and `allow_size_mismatch`.

    Raises:
        ValueError, FileNotFoundError, OSError: see `DataSettings`.
    """
    tasks = None if tasks is None else list(tasks)
    data = DataSettings(suite, tasks, few_shot=few_shot, order_seed=seed, **options)
    return data.draw(data.load(progress), seed)


def _few(task: Task, few_shot: int, seed: int) -> Dataset:
    labels = labels_of(task.train)
    generator, rows = np.random.default_rng(seed), []
    for label, name in enumerate(task.class_names):
        members = np.flatnonzero(labels == label)
        if len(members) < few_shot:
            raise ValueError(f"Task {task.name!r} has {len(members)} images of {name!r}; few_shot={few_shot} is more.")
        rows.extend(sorted(generator.permutation(members)[:few_shot].tolist()))
    return task.train.select(rows)
