"""Changes of accuracy as heat maps, so that what a method forgot is seen at a glance.

Shapes: T tasks. Rows are the stages, after training a task; columns the tasks tested.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from peft_moe_merge.report.page import Cell, Fold, HeatMap

from .changes import ZERO_SHOT, mean_over_zero_shot, since_learnt
from .summary import ranking

LEAST_SCALE = 5.0  # percentage points; less than that does not take the full colour
CHANGES_NOTE = (
    "Percentage points, means over seeds. Rows: after training a task; columns: the task tested. Blue is gained, orange lost. "
    "Against zero-shot: right of the diagonal tasks are not learnt yet, and what changes there is zero-shot ability."
)
FORGETTING_NOTE = "Since it was just learnt: what a task lost, or gained, by what was learnt after it."


def change_maps(results: dict[str, Any]) -> list[Fold]:
    """Draw each method's changes, the best method first and open: against zero-shot, and since a task was just learnt.

    Against zero-shot there is a map where zero-shot was run with one of the method's seeds. One scale of colours holds for
    all methods, and another one for forgetting, which is of a smaller size.
    """
    methods = [name for name in ranking(results) if name != ZERO_SHOT]
    zero_shot = results["methods"].get(ZERO_SHOT, [])
    gains = {name: mean_over_zero_shot(results["methods"][name], zero_shot) for name in methods}
    losses = {
        name: np.mean([since_learnt(run["matrix"]) for run in results["methods"][name]], axis=0) for name in methods
    }
    gain_scale, loss_scale = (_scale(list(maps.values())) for maps in (gains, losses))
    folds = []
    for name in methods:
        accuracy_TT = np.mean([run["matrix"] for run in results["methods"][name]], axis=0)
        parts = []
        if gains[name] is not None:
            title = "Against zero-shot"
            parts.append(_map(results["tasks"], title, accuracy_TT, gains[name], gain_scale))
        if len(results["tasks"]) > 1:
            title = "Since it was just learnt"
            parts.append(_map(results["tasks"], title, accuracy_TT, losses[name], loss_scale))
        if parts:
            folds.append(Fold(name, parts, open=not folds))
    return folds


def _scale(maps: list[np.ndarray | None]) -> float:
    known = [np.nanmax(np.abs(one), initial=0.0) for one in maps if one is not None and not np.isnan(one).all()]
    return max([LEAST_SCALE, *known])


def _map(tasks: list[str], title: str, accuracy_TT: np.ndarray, change_TT: np.ndarray, scale: float) -> HeatMap:
    lines = []
    for stage, of_stage in enumerate(tasks):
        cells = [
            _cell(f"{tested} after {of_stage}", accuracy_TT[stage, task], change_TT[stage, task], scale)
            for task, tested in enumerate(tasks)
        ]
        known = change_TT[stage][~np.isnan(change_TT[stage])]
        cells.append(Cell(_signed(known.mean()) if len(known) else ""))
        lines.append((of_stage, cells))
    return HeatMap(["after", *tasks, "mean"], lines, title)


def _cell(what: str, accuracy: float, change: float, scale: float) -> Cell:
    if np.isnan(change):
        return Cell("", f"{what}: {accuracy:.1f} %")
    return Cell(_signed(change), f"{what}: {accuracy:.1f} %, was {accuracy - change:.1f} %", change / scale)


def _signed(change: float) -> str:
    return f"{round(change, 1) or 0.0:+.1f}"  # no -0.0
