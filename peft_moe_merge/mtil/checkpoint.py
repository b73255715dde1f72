"""The state of a stream on disk, so that it can stop anywhere and go on.

One folder per learnt task, `<folder>/after_<n>`, and in it the method's weights and `progress.json`. All randomness of
a task comes from the seed and its position, so nothing else needs keeping: a task that was interrupted is done anew, to
the same result. Nothing in it is of one process or another, so that any number of them can go on. Nothing else that is in the folder is looked at or touched.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_moe_merge.files import drop, whole

from .fingerprint import PROCESSES, differences_but_processes

GO_ON = "go on by `resume=True` (`--resume`)"
"""What to do after a failure, once its cause is mended."""

SELECTORS = "selectors"
"""The folder in a checkpoint in which a run's task selectors are."""

PROGRESS = "progress.json"
"""The file by which a checkpoint is known; it is written last."""


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
) -> None:
    """Write the checkpoint of the task just learnt, then drop those before. It appears whole or not at all.

    Raises:
        OSError: it could not be written, say for want of space. The one before is as it was.
    """
    with whole(folder / f"after_{len(progress.matrix)}", GO_ON) as partial:
        partial.mkdir(parents=True)
        write_weights(partial)
        progress.stored_bytes = sum(path.stat().st_size for path in partial.rglob("*.safetensors"))
        if write_selectors is not None:
            write_selectors(partial / SELECTORS)
        (partial / PROGRESS).write_text(json.dumps(asdict(progress)))
    drop_older(folder)


def drop_older(folder: Path) -> None:
    """Remove all checkpoints but the newest, and what a process that was killed left of one. One process may call at a time."""
    for checkpoint in sorted(_checkpoints(folder), key=_tasks)[:-1]:
        drop(checkpoint)
    for path in folder.glob("after_*.partial"):
        if re.fullmatch(r"after_[1-9][0-9]*\.partial", path.name) and path.is_dir():
            shutil.rmtree(path)


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
        ValueError: the run was started with other settings, or its progress can't be read.
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
        progress = Progress(**json.loads((checkpoint / PROGRESS).read_text()))
        done, listed = len(progress.matrix), dict(progress.settings)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(checkpoint / PROGRESS)!r} can't be read: {error}. It is damaged or of another release: delete "
            f"{str(checkpoint)!r} to do the run anew, or choose another output folder."
        ) from error
    if done != _tasks(checkpoint):
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
