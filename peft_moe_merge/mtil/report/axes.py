"""Axes that run over the optimizer steps of a stream."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes


def mark_tasks(axes: Axes, tasks: Sequence[str], lengths: Sequence[int]) -> None:
    """Separate the tasks on an axis of steps, and name them above it.

    Args:
        axes: the panel.
        tasks: names, in order.
        lengths: steps of each task.
    """
    for task, first, length in zip(tasks, starts(lengths), lengths, strict=False):
        axes.axvline(first, color="#cccccc", linewidth=0.6, zorder=0)
        middle = (first + length / 2, 1.01)
        axes.annotate(task, middle, xycoords=("data", "axes fraction"), ha="center", fontsize=7, color="#555555")
    axes.set_xlim(0, 1.01 * max(1, sum(lengths)))


def short_names(tasks: Sequence[str]) -> list[str]:
    """The tasks' names if there are few, else their numbers, as there is no room for more above a narrow panel."""
    return list(tasks) if len(tasks) <= 4 else [str(number) for number in range(1, len(tasks) + 1)]


def starts(lengths: Sequence[int]) -> list[int]:
    """The steps before each task."""
    return [sum(lengths[:position]) for position in range(len(lengths))]
