"""How the benchmarks of speed measure: contestants take turns in one process, and ratios are taken within a round."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from peft_moe_merge.files import whole

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""The processor's time, of all threads together, is for machines where others use the cores; take one thread then."""


def finish() -> None:
    """Wait for what a GPU still has to do, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(run: Callable[[], Any], clock: str = "wall", times: int = 1) -> Callable[[], dict[str, float]]:
    """Make a contestant of a call: called, it runs it so many times and returns the seconds of one, a GPU's work included."""

    def contestant() -> dict[str, float]:
        finish()
        began = CLOCKS[clock]()
        for _ in range(times):
            run()
        finish()
        return {"step": (CLOCKS[clock]() - began) / times}

    return contestant


def take_turns(
    contestants: Mapping[str, Callable[[], dict[str, float]]], rounds: int, title: str
) -> dict[str, dict[str, list[float]]]:
    """Let every contestant run once a round, after a round to warm up, in an order that moves on by one each round.

    Args:
        contestants: by name; each returns the seconds of its phases.
        rounds: that count.
        title: of the progress bar.

    Returns:
        Per contestant and phase, the seconds in each round.
    """
    names = list(contestants)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for turn in tqdm(range(rounds + 1), desc=title, leave=False):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for phase, elapsed in contestants[name]().items():
                if turn > 0:
                    seconds[name].setdefault(phase, []).append(elapsed)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Divide round by round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, list[float]]:
    """Return the median, and the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], [values[0]] * 2
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, [low, high]


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write what was measured, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1))
