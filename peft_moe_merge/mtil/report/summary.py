"""Results of a stream in words: what won, by how much, what was forgotten, and what is uncertain.

Every sentence follows from the results alone. Methods are compared seed by seed with the one rule of uncertainty of
`report.statistics`; a single seed has no interval, and the words say so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_moe_merge.report.statistics import Estimate, estimate, over_seeds, paired_differences

from .changes import ZERO_SHOT, since_learnt

EVEN = 0.05  # percentage points; what is less is 0.0 in print


def summary(results: dict[str, Any]) -> list[str]:
    """Say what came of a run.

    Args:
        results: what `read_results` returns.

    Returns:
        Sentences, in the order: what won, what that is against zero-shot, what was forgotten, what is uncertain. Empty
        where there are no runs.
    """
    if not ranking(results):
        return []
    said = (winner(results), against_zero_shot(results), forgotten(results), uncertain(results))
    return [sentence for sentence in said if sentence]


def ranking(results: dict[str, Any]) -> list[str]:
    """Order the methods by Last in the mean over their seeds, the best first; zero-shot is among them."""
    last = {name: over_seeds(runs, "last").mean for name, runs in results["methods"].items()}
    return sorted((name for name in last if last[name] is not None), key=lambda name: -last[name])


def winner(results: dict[str, Any]) -> str:
    """Say which method has the best Last, and by how much it leads the second; "" without runs."""
    order = ranking(results)
    if not order:
        return ""
    best, *others = order
    first = (
        f"{best} comes out first: at the end of the stream its accuracy, in the mean over {tasks_words(results)}, is "
    )
    first += _percent(over_seeds(results["methods"][best], "last"))
    if not others:
        return f"{first}. No other method was run."
    lead = _lead(results, best, others[0], "last")
    if lead.mean is None:
        return f"{first}. {others[0]} is second, with other seeds."
    if abs(lead.mean) < EVEN:
        return f"{first}, and even with that of {others[0]}{interval_words(lead)}."
    return f"{first}, {lead.mean:+.1f} points from that of {others[0]}, the second{interval_words(lead)}."


def against_zero_shot(results: dict[str, Any], method: str | None = None) -> str:
    """Say what the best method, or another, gains over the untouched CLIP: at the end, and on tasks not learnt yet.

    Args:
        results: what `read_results` returns.
        method: whose gain; None for the best by Last.

    Returns:
        A sentence; "" where zero-shot was not run with one of the method's seeds, or is the method.
    """
    method = method or ranking(results)[0]
    if method == ZERO_SHOT or ZERO_SHOT not in results["methods"]:
        return ""
    gain, transfer = (_lead(results, method, ZERO_SHOT, metric) for metric in ("last", "transfer"))
    if gain.mean is None:
        return ""
    changed = f"Against zero-shot, {method} {'gained' if gain.mean >= 0 else 'lost'} {_points(abs(gain.mean))}"
    changed += interval_words(gain)
    if transfer.mean is None:
        return f"{changed}."
    if abs(transfer.mean) < EVEN:
        return f"{changed}; on tasks not learnt yet (Transfer) it is as good."
    return f"{changed}; on tasks not learnt yet (Transfer) {transfer.mean:+.1f}{interval_words(transfer)}."


def forgotten(results: dict[str, Any], method: str | None = None) -> str:
    """Say how much the best method, or another, had lost at the end of what it had just learnt, and where most.

    Args:
        results: what `read_results` returns.
        method: whose loss; None for the best by Last.

    Returns:
        A sentence; "" for a single task, and for zero-shot, which learns nothing.
    """
    method = method or ranking(results)[0]
    if method == ZERO_SHOT or len(results["tasks"]) < 2:
        return ""
    end_ST = np.stack([since_learnt(run["matrix"])[-1, :-1] for run in results["methods"][method]])
    if np.abs(end_ST).max() < EVEN:
        return f"{method} forgot nothing: every task is at the end as good as when it was just learnt."
    end_T, mean = end_ST.mean(axis=0), end_ST.mean()
    if end_ST.min() > -EVEN:
        return f"{method} forgot nothing: tasks are at the end {_points(mean)} better than when they were just learnt."
    change = "as good as" if abs(mean) < EVEN else f"{_points(abs(mean))} {'worse' if mean < 0 else 'better'} than"
    said = f"In the mean, {method}'s tasks are at the end {change} when they were just learnt"
    worst = int(end_T.argmin())
    if end_T[worst] > -EVEN:
        return f"{said}; what one seed lost, others gained."
    return f"{said}; {results['tasks'][worst]} lost most, {_points(-end_T[worst])}."


def uncertain(results: dict[str, Any]) -> str:
    """Say what these seeds do not tell; "" without runs."""
    order = ranking(results)
    if not order:
        return ""
    best, *others = order
    leads = {name: _lead(results, best, name, "last") for name in others}
    unpaired = [name for name in others if leads[name].half is None]
    open_ = [name for name in others if leads[name].half is not None and leads[name].low <= 0]
    if len(results["methods"][best]) == 1:
        return (
            f"{best} was run with one seed, so nothing here tells how far another seed would be from this one: take small "
            "differences for chance."
        )
    said = []
    if open_:
        said.append(f"These seeds don't tell {best} from {_list(open_)}: the intervals of the differences contain 0.")
    elif others and not unpaired:
        said.append(f"{best} leads {_list(others)} in every interval.")
    if unpaired:
        said.append(
            f"How far {_list(unpaired)} would be with other seeds is open: fewer than two seeds are in common."
        )
    if len(others) > 1:
        said.append(
            f"The best of {len(order)} was picked by the same numbers, and intervals are not widened for that, so its lead "
            "is likely to look a little too large."
        )
    return " ".join(said)


def _lead(results: dict[str, Any], method: str, other: str, metric: str) -> Estimate:
    return estimate(paired_differences(results["methods"][method], results["methods"][other], metric))


def _percent(known: Estimate) -> str:
    return f"{known.mean:.1f} %" + ("" if known.half is None else f" (±{known.half:.1f})")


def _points(value: float) -> str:
    return f"{value:.1f} points"


def interval_words(known: Estimate, digits: int = 1) -> str:
    """Tell the interval of a difference, in brackets; or that there is none."""
    if known.half is None:
        return " (one seed)"
    return f" (95 % interval over {known.seeds} seeds: {known.low:+.{digits}f} to {known.high:+.{digits}f})"


def tasks_words(results: dict[str, Any]) -> str:
    """Tell how many tasks there are."""
    count = len(results["tasks"])
    return f"{count} tasks" if count > 1 else "one task"


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
