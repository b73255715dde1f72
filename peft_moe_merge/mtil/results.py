"""`results.json`: what runs leave behind for reports and other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_moe_merge.files import whole

from .checkpoint import GO_ON, Progress
from .metrics.mtil import stream_metrics

PACKAGES = ("peft-moe-merge", "torch", "transformers", "peft", "accelerate", "datasets")
KEYS = ("suite", "tasks", "methods")
METRICS = ("transfer", "average", "last", "forgetting")
RUN_KEYS = ("seed", "matrix")
"""What a run can't be read without. Metrics follow from the matrix; a report leaves out what else is not there."""


def run_result(seed: int, progress: Progress) -> dict[str, Any]:
    """Sum up one finished run.

    Returns:
        Accuracies in percent, `matrix[i][j]` on task j after training task i; None for what there is not, such as the
        transfer of the first task.
    """
    return without_nan(
        {
            "seed": seed,
            "matrix": progress.matrix,
            **stream_metrics(progress.matrix),
            "seconds": progress.seconds,
            "trainable_parameters": progress.trainable_parameters,
            "stored_bytes": progress.stored_bytes,
            "losses": progress.losses,
            "merges": progress.merges,
            "frozen": progress.frozen,
            "usage": progress.usage,
            "selection": selection_result(progress),
        }
    )


def selection_result(progress: Progress) -> dict[str, Any]:
    """Sum up what came of choosing tasks by selectors.

    Returns:
        Per selector and decision (`per_image`, `per_batch`) the stream's metrics as if these were a method; per learnt
        task the `confusion` (data sets x (tasks + none), counts), `selected_right` (percent per data set) and `auroc`
        of telling tasks not learnt yet from the others; and per selector `bytes_per_task`.
    """
    result: dict[str, Any] = {}
    for name, added in progress.selector_bytes.items():
        result[name] = {"bytes_per_task": added}
        for decision in progress.selection[0][name]:
            stages = [told[name][decision] for told in progress.selection]
            matrix = [stage["accuracies"] for stage in stages]
            result[name][decision] = {
                "matrix": matrix,
                **stream_metrics(matrix),
                "confusion": [stage["confusion"] for stage in stages],
                "selected_right": [
                    selected_right(stage["confusion"], learnt) for learnt, stage in enumerate(stages, start=1)
                ],
                "auroc": [stage["auroc"] for stage in stages],
            }
    return result


def selected_right(confusion: list[list[int]], learnt: int) -> list[float]:
    """Per data set, how many percent of its images got what they should: their own task, or none if it is not learnt."""
    return [100.0 * row[task if task < learnt else -1] / sum(row) for task, row in enumerate(confusion)]


def without_nan(value: Any) -> Any:
    """Put None in the place of every number that JSON has no word for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results.json` whole or not at all.

    Raises:
        ValueError: a number is NaN or infinite.
        OSError: it could not be written, say for want of space. What was there before is as it was.
    """
    with whole(path, GO_ON) as partial:
        partial.write_text(json.dumps(results, indent=1, allow_nan=False))


def read_results(path: Path) -> dict[str, Any]:
    """Read `results.json`.

    Raises:
        ValueError: the file is not JSON, or lacks `KEYS` or, in a run, `RUN_KEYS`.
    """
    try:
        results = without_nan(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. Give the results.json of a run.") from error
    lacking = _lacking(results, KEYS)
    if not lacking:
        runs = ((name, run) for name, runs in results["methods"].items() for run in runs)
        lacking = [f"{name}: {key}" for name, run in runs for key in _lacking(run, RUN_KEYS)]
    if lacking:
        raise ValueError(
            f"{str(path)!r} lacks {', '.join(lacking)}. Give the results.json of a run; `--resume` on its output folder "
            "writes it anew."
        )
    results = {**results, "settings": results.get("settings") or {}, "versions": results.get("versions") or {}}
    for runs in results["methods"].values():
        runs[:] = [without_nan(stream_metrics(run["matrix"])) | run for run in runs]
    return results


def extended_results(path: Path, results: dict[str, Any], *, may_differ: Collection[str] = ()) -> dict[str, Any]:
    """Take over the runs that an output folder tells of already, so that more methods and seeds stand beside them.

    Args:
        path: of `results.json`, which need not exist.
        results: a document without runs.
        may_differ: settings that make no difference to what a run comes to.

    Raises:
        ValueError: the folder's runs are of another suite, or were made with other settings.
    """
    if not path.exists():
        return results
    before = read_results(path)

    def told(document: dict[str, Any]) -> dict[str, Any]:
        compared = {name: value for name, value in document["settings"].items() if name not in may_differ}
        return json.loads(json.dumps({"suite": document["suite"], "tasks": document["tasks"], **compared}))

    was, now = told(before), told(results)
    changed = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    if changed:
        listed = "; ".join(f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise ValueError(
            f"{str(path)!r} tells of runs with other settings: {listed}. Use theirs, so that the runs can be compared, "
            "or choose another output folder."
        )
    return {**results, "methods": before["methods"]}


def add_run(results: dict[str, Any], method: str, run: dict[str, Any]) -> None:
    """Put a run beside the method's runs with other seeds, in their order; it takes the place of one with its own."""
    others = [other for other in results["methods"].get(method, []) if other["seed"] != run["seed"]]
    results["methods"][method] = sorted([*others, run], key=lambda run: run["seed"])


def _lacking(value: Any, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if not isinstance(value, dict) or key not in value]


def empty_results(suite: str, tasks: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Start a results document without runs."""
    return {
        "suite": suite,
        "tasks": tasks,
        "settings": settings,
        "versions": {package: version(package) for package in PACKAGES},
        "methods": {},
    }
