"""The state of a stream on disk, so that it can stop anywhere and go on.

One folder per learnt task, `<folder>/after_<n>`, and in it the method's weights and `progress.json`. All randomness of
a task comes from the seed and its position, so nothing else needs keeping: a task that was interrupted is done anew, to
the same result. Nothing in it is of one process or another, so that any number of them can go on. Nothing else that is in the
folder is looked at or touched.

What is over is written once: each task's results in `results_<n>.json`, in `finished` the weights that a method will not
change any more, and what selectors keep of a task. The next checkpoint has the same files, by a second name of each (a hard
link), and `progress.json` their checksums.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from peft_moe_merge.files import PARTS, drop, file_sum, link_or_copy, part_file, whole

from .fingerprint import PROCESSES, differences_but_processes

GO_ON = "go on by `resume=True` (`--resume`)"
"""What to do after a failure, once its cause is mended."""

SELECTORS = "selectors"
"""The folder in a checkpoint in which a run's task selectors are."""

PROGRESS = "progress.json"
"""The file by which a checkpoint is known; it is written last."""

FINISHED = "finished"
"""The folder in a checkpoint with weights that are never written again; methods name the files."""

RESULTS = "results_*.json"
"""The files in a checkpoint with what came of each task."""

WRITTEN = (RESULTS, f"{FINISHED}/*", f"{SELECTORS}/*/{PARTS}")
"""What is written once."""

PER_TASK = ("matrix", "losses", "history", "selection", "x_tail")
"""The fields of `Progress` that have an entry per task."""

WRITTEN_ONCE = "written_once"
"""The key under which `progress.json` holds the checksums of all files that are written once."""


@dataclass
class Progress:
    """What a stream has to show so far.

    Attributes:
        settings: the run's fingerprint and seed; a resumed one must have the same, but for the number of processes.
        matrix: one row of accuracies, in percent, per learnt task.
        seconds: spent on training and evaluation.
        processes: per learnt task, how many trained it.
        losses: per learnt task, the loss of each step.
        history: per learnt task, what the method tells of its training: values by name, see `Method.history`.
        selection: per learnt task, what came of choosing the task by each selector.
        x_tail: per learnt task, if asked for: who chose the task, how, and accuracies among all classes; selector and decision
            are None for a method that needs no choice.
        selector_bytes: per selector, how much a task adds to it.
        trainable_parameters: of the largest task.
        stored_bytes: that the method's weights take on disk.
    """

    settings: dict[str, Any]
    matrix: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    processes: list[int] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    selection: list[Any] = field(default_factory=list)
    x_tail: list[list[Any]] = field(default_factory=list)
    selector_bytes: dict[str, int] = field(default_factory=dict)
    trainable_parameters: int = 0
    stored_bytes: int = 0


def finished_file(checkpoint: Path, position: int) -> Path:
    """Name the file in a checkpoint for weights that are finished with the task at a position."""
    return checkpoint / FINISHED / part_file(position)


def write_finished(checkpoint: Path, tasks: int, weights_of: Callable[[int], dict[str, Tensor]]) -> None:
    """Write the finished weights of each task, asked for by position, that the checkpoint before did not bring along."""
    (checkpoint / FINISHED).mkdir(exist_ok=True)
    for position in range(tasks):
        if not (file := finished_file(checkpoint, position)).exists():
            save_file(weights_of(position), file)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the latest task, if there is any.

    Raises:
        FileExistsError: a file or folder has a checkpoint's name and is none.
    """
    return max(_checkpoints(folder), key=_tasks, default=None)


def _tasks(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("after_"))


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that are whole; several if a process was killed before it dropped the older ones."""
    named = [path for path in folder.glob("after_*") if re.fullmatch(r"after_[1-9][0-9]*", path.name)]
    for path in named:
        if not (path / PROGRESS).is_file():
            raise FileExistsError(
                f"{str(path)!r} has the name of a checkpoint and is none: there is no {PROGRESS} in it. Move or delete "
                "it, or choose another output folder."
            )
    return named


def save(
    folder: Path,
    progress: Progress,
    write_weights: Callable[[Path], None],
    write_selectors: Callable[[Path], None] | None = None,
    goes_on: bool = True,
) -> None:
    """Write the checkpoint of the task just learnt, then drop those before. It appears whole or not at all.

    Args:
        folder: of the run.
        progress: what it has to show.
        write_weights: writes the method's weights into a folder, in which those of `FINISHED` are already.
        write_selectors: writes the run's selectors into a folder.
        goes_on: there are tasks to come. Else the weights are written whole, and none are carried over.

    Raises:
        OSError: it could not be written, say for want of space. The one before is as it was.
    """
    before = _checkpoints(folder)
    with whole(folder / f"after_{len(progress.matrix)}", GO_ON) as partial:
        partial.mkdir(parents=True)
        sums = _carry_over(max(before, key=_tasks, default=None), partial, WRITTEN if goes_on else (RESULTS,))
        write_weights(partial)
        weights = (path for path in partial.rglob("*.safetensors") if partial / SELECTORS not in path.parents)
        progress.stored_bytes = sum(path.stat().st_size for path in weights)
        if write_selectors is not None:
            write_selectors(partial / SELECTORS)
        told = {name: value for name, value in vars(progress).items() if name not in PER_TASK}
        _write_results(partial, progress)
        for file in _written_once(partial):
            if file not in sums:
                sums[file] = file_sum(partial / file)
        (partial / PROGRESS).write_text(json.dumps({**told, WRITTEN_ONCE: sums}))
    drop_older(folder)


def drop_older(folder: Path) -> None:
    """Remove all checkpoints but the newest, and what a process that was killed left of one. One process may call at a time."""
    for checkpoint in sorted(_checkpoints(folder), key=_tasks)[:-1]:
        drop(checkpoint)
    for path in folder.glob("after_*.partial"):
        if re.fullmatch(r"after_[1-9][0-9]*\.partial", path.name) and path.is_dir():
            shutil.rmtree(path)


def _written_once(checkpoint: Path, kinds: tuple[str, ...] = WRITTEN) -> list[str]:
    return sorted(path.relative_to(checkpoint).as_posix() for kind in kinds for path in checkpoint.glob(kind))


def _carry_over(before: Path | None, partial: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    """Put what was written once into the next checkpoint too, and return the checksums."""
    if before is None:
        return {}
    known, sums = json.loads((before / PROGRESS).read_text()).get(WRITTEN_ONCE, {}), {}
    for file in _written_once(before, kinds):
        if file in known:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(before / file, partial / file)
            sums[file] = known[file]
    return sums


def _write_results(folder: Path, progress: Progress) -> None:
    for position in range(len(progress.matrix)):
        file = folder / RESULTS.replace("*", f"{position + 1:04d}")
        if not file.exists():
            entries = {name: getattr(progress, name) for name in PER_TASK}
            file.write_text(json.dumps({name: of[position] for name, of in entries.items() if len(of) > position}))


def _check_written_once(checkpoint: Path, sums: dict[str, str]) -> None:
    """Raise a ValueError unless all files that were written once are there, as they were written."""
    for file, expected in sums.items():
        path = checkpoint / file
        if path.is_file() and file_sum(path) == expected:
            continue
        what = "does not have the checksum that stands" if path.is_file() else "is missing, and named"
        raise ValueError(
            f"{str(path)!r} {what} in {PROGRESS}: the checkpoint is damaged. Put the file back from a copy, or delete "
            f"{str(checkpoint)!r} to do the run anew, or choose another output folder."
        )


def load(folder: Path, settings: dict[str, Any], resume: bool = True) -> tuple[Progress, Path] | None:
    """Read the newest checkpoint. It may be of another number of processes, of which a warning tells.

    Args:
        folder: of the run.
        settings: its fingerprint and seed.
        resume: whether there may be one.

    Returns:
        What was done, with these settings, and the folder of the weights; None if there is nothing to resume.

    Raises:
        FileExistsError: there is one and `resume` is off, or something else has its name.
        ValueError: the run was started with other settings, its progress can't be read, or a file is missing or damaged.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    if not resume:
        raise FileExistsError(
            f"{str(folder)!r} holds a run already. Go on with it by `resume=True` (`--resume`), or choose another "
            "output folder."
        )
    try:
        told = json.loads((checkpoint / PROGRESS).read_text())
        sums = dict(told.pop(WRITTEN_ONCE, {}))
        progress = Progress(**told)
        listed, progress.matrix = dict(progress.settings), list(progress.matrix)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(checkpoint / PROGRESS)!r} can't be read: {error}. It is damaged or of another release: delete "
            f"{str(checkpoint)!r} to do the run anew, or choose another output folder."
        ) from error
    _check_written_once(checkpoint, sums)
    for file in sorted(name for name in sums if fnmatch(name, RESULTS)):  # none in a checkpoint of an older release
        for name, entry in json.loads((checkpoint / file).read_text()).items():
            getattr(progress, name).append(entry)
    if (done := len(progress.matrix)) != _tasks(checkpoint):
        raise ValueError(
            f"{str(checkpoint)!r} tells of {done} tasks: it was renamed or damaged. Delete it to do the run anew, or choose "
            "another output folder."
        )
    if changed := differences_but_processes(listed, json.loads(json.dumps(settings))):
        raise ValueError(
            f"{str(folder)!r} holds a run with other settings: {changed}. Resume with those of the run, or choose another "
            "output folder."
        )
    progress.processes = progress.processes or [listed[PROCESSES]] * done  # an older release did not tell
    progress.settings = settings
    return progress, checkpoint
