"""`results.json`: what runs leave behind for reports and other programs."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peft_moe_merge.files import whole

from .checkpoint import GO_ON, Progress
from .fingerprint import differences_but_processes
from .metrics.mtil import stream_metrics

PACKAGES = ("peft-moe-merge", "torch", "transformers", "peft", "accelerate", "datasets")
KEYS = ("suite", "tasks", "methods")
METRICS = ("transfer", "average", "last", "forgetting")
ANEW = (
    "Give the results.json of a run. If it is damaged, delete it and start the run's command again with `--resume`: that "
    "writes it anew, from the checkpoints."
)
TOLD = ("merges", "frozen", "usage")
"""What methods with experts tell; of others there are no such events."""
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
            "processes": progress.processes,
            "trainable_parameters": progress.trainable_parameters,
            "stored_bytes": progress.stored_bytes,
            "losses": progress.losses,
            **{name: [] for name in TOLD},
            **history_result(progress),
            "selection": selection_result(progress),
            "x_tail": x_tail_result(progress),
        }
    )


def history_result(progress: Progress) -> dict[str, list[Any]]:
    """List what a method told of each task, by name; None where it told nothing."""
    names = dict.fromkeys(name for of_task in progress.history for name in of_task)
    return {name: [of_task.get(name) for of_task in progress.history] for name in names}


def selection_result(progress: Progress) -> dict[str, Any]:
    """Sum up what came of choosing tasks by selectors.

    Returns:
        Per selector and decision (`per_image`, `per_batch`, `candidates`, `soft`) the stream's metrics as if these were a method; per learnt
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


def x_tail_result(progress: Progress) -> list[dict[str, Any]]:
    """Sum up what came of telling images apart among all classes, the task not known.

    Returns:
        For each way of choosing the task the `selector` and `decision`, None where the method needs no choice, and the
        stream's metrics of these accuracies.
    """
    result = []
    for of_stages in zip(*progress.x_tail, strict=True):
        (selector, decision, _), matrix = of_stages[0], [accuracies for _, _, accuracies in of_stages]
        result.append({"selector": selector, "decision": decision, "matrix": matrix, **stream_metrics(matrix)})
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
    """Read `results.json`, compressed if it ends on `.gz`.

    Raises:
        ValueError: the file is not JSON, or lacks `KEYS` or, in a run, `RUN_KEYS`.
    """
    try:
        content = path.read_bytes()
        results = without_nan(json.loads(gzip.decompress(content) if path.suffix == ".gz" else content))
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}. {ANEW}") from error
    lacking = _lacking(results, KEYS)
    if not lacking:
        runs = ((name, run) for name, runs in results["methods"].items() for run in runs)
        lacking = [f"{name}: {key}" for name, run in runs for key in _lacking(run, RUN_KEYS)]
    if lacking:
        raise ValueError(f"{str(path)!r} lacks {', '.join(lacking)}. {ANEW}")
    results = {**results, "settings": results.get("settings") or {}, "versions": results.get("versions") or {}}
    for runs in results["methods"].values():
        runs[:] = [without_nan(stream_metrics(run["matrix"])) | run for run in runs]
    return results


def extended_results(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Take over the runs that an output folder tells of already, so that more methods and seeds stand beside them.

    Args:
        path: of `results.json`, which need not exist.
        results: a document without runs.

    Raises:
        ValueError: the file is damaged, or its runs have another fingerprint.
    """
    if not path.exists():
        return results
    before = read_results(path)
    if "fingerprint" not in before:
        raise ValueError(
            f"{str(path)!r} does not say what its runs were shaped by: it is of another release. Choose another output "
            "folder."
        )
    if changed := differences_but_processes(before["fingerprint"], json.loads(json.dumps(results["fingerprint"]))):
        raise ValueError(
            f"{str(path)!r} tells of runs with other settings: {changed}. Use theirs, so that the runs can be compared, "
            "or choose another output folder."
        )
    return {**results, "methods": before["methods"]}


def add_run(results: dict[str, Any], method: str, run: dict[str, Any]) -> None:
    """Put a run beside the method's runs with other seeds, in their order; it takes the place of one with its own."""
    others = [other for other in results["methods"].get(method, []) if other["seed"] != run["seed"]]
    results["methods"][method] = sorted([*others, run], key=lambda run: run["seed"])


def _lacking(value: Any, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if not isinstance(value, dict) or key not in value]


def empty_results(
    suite: str, tasks: list[str], settings: dict[str, Any], fingerprint: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Start a results document without runs.

    Args:
        suite: name or folder.
        tasks: names, in order.
        settings: all that was set, for readers.
        fingerprint: what runs must agree in to stand here together.
    """
    return {
        "suite": suite,
        "tasks": tasks,
        "settings": settings,
        **({} if fingerprint is None else {"fingerprint": fingerprint}),
        "versions": {package: version(package) for package in PACKAGES},
        "methods": {},
    }
