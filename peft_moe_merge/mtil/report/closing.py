"""The last words of a run: what was learnt, and what to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from peft_moe_merge.report.statistics import estimate, over_seeds, paired_differences

from .changes import ZERO_SHOT, since_learnt
from .summary import EVEN, ranking, tasks_words


def closing(results: dict[str, Any], page: Path) -> list[str]:
    """Say in one sentence what was learnt, and in another what to open.

    Args:
        results: what `read_results` returns.
        page: the report.

    Returns:
        Two sentences; the second alone where there are no runs.
    """
    opened = f"Open {page} for every accuracy as a change, and for what is uncertain."
    order = ranking(results)
    return [_learnt(results, order[0]), opened] if order else [opened]


def _learnt(results: dict[str, Any], best: str) -> str:
    runs, count = results["methods"][best], len(results["tasks"])
    right = f"{over_seeds(runs, 'last').mean:.1f} % right in the mean over {tasks_words(results)}"
    seeds = " (one seed)" if len(runs) == 1 else f" (means over {len(runs)} seeds)"
    if best == ZERO_SHOT:
        others = "the only method run" if len(results["methods"]) == 1 else "which no method surpassed"
        return f"The untouched CLIP, {others}, gets {right}{seeds}."
    said = [f"{best} gets {right}"]
    gain = estimate(paired_differences(runs, results["methods"].get(ZERO_SHOT, []), "last")).mean
    if gain is not None:
        said.append(
            "as the untouched CLIP does" if abs(gain) < EVEN else f"{gain:.1f} points above the untouched CLIP"
        )
    if count > 1:
        change = float(np.mean([since_learnt(run["matrix"])[-1, :-1] for run in runs]))
        lost = f"{-change:.1f} points" if change <= -EVEN else "nothing"
        said.append(f"and has since lost {lost} of what each task had when it was just learnt")
    return f"{', '.join(said)}{seeds}."
