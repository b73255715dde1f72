"""The state of a stream on disk, so that it can stop anywhere and go on.

One folder per learnt task, `<folder>/after_<n>`, and in it the method's weights and `progress.json`. All randomness of
a task comes from the seed and its position, so nothing else needs keeping: a task that was interrupted is done anew, to
the same result.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_moe_merge.files import whole

GO_ON = "go on by `resume=True` (`--resume`)"
"""What to do after a failure, once its cause is mended."""

SELECTORS = "selectors"
"""The folder in a checkpoint in which a run's task selectors are."""


@dataclass
class Progress:
    """What a stream has to show so far.

    Attributes:
        settings: what the run was started with; a resumed one must be the same.
        matrix: one row of accuracies, in percent, per learnt task.
        seconds: spent on training and evaluation.
        losses: per learnt task, the loss of each step.
        merges: per learnt task, the steps at which experts merged and what became of them.
        frozen: per learnt task, the frozen experts of each block after it.
        usage: per learnt task, how often its router selected each expert of each block in training.
        selection: per learnt task, what came of choosing the task by each selector.
        selector_bytes: per selector, how much a task adds to it.
        trainable_parameters: of the largest task.
        stored_bytes: that the method's weights take on disk.
    """

    settings: dict[str, Any]
    matrix: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)
    merges: list[Any] = field(default_factory=list)
    frozen: list[Any] = field(default_factory=list)
    usage: list[Any] = field(default_factory=list)
    selection: list[Any] = field(default_factory=list)
    selector_bytes: dict[str, int] = field(default_factory=dict)
    trainable_parameters: int = 0
    stored_bytes: int = 0


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the latest task, if there is any."""
    return max(_checkpoints(folder), key=lambda path: int(path.name.removeprefix("after_")), default=None)


def _checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints that are whole; several if a process was killed before it dropped the older ones."""
    return [path for path in folder.glob("after_*") if path.suffix != ".partial"]


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
    before = _checkpoints(folder)
    with whole(folder / f"after_{len(progress.matrix)}", GO_ON) as partial:
        partial.mkdir(parents=True)
        write_weights(partial)
        progress.stored_bytes = sum(path.stat().st_size for path in partial.rglob("*.safetensors"))
        if write_selectors is not None:
            write_selectors(partial / SELECTORS)
        (partial / "progress.json").write_text(json.dumps(asdict(progress)))
    for checkpoint in before:
        shutil.rmtree(checkpoint)


def load(folder: Path, settings: dict[str, Any]) -> tuple[Progress, Path] | None:
    """Read the newest checkpoint.

    Returns:
        What was done, and the folder of the weights; None if there is nothing to resume.

    Raises:
        ValueError: the run was started with other settings.
    """
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    progress = Progress(**json.loads((checkpoint / "progress.json").read_text()))
    now = json.loads(json.dumps(settings))
    changed = {
        name: (progress.settings.get(name), now.get(name))
        for name in progress.settings.keys() | now.keys()
        if progress.settings.get(name) != now.get(name)
    }
    if changed:
        told = "; ".join(f"{name} was {before!r}, is {after!r}" for name, (before, after) in sorted(changed.items()))
        raise ValueError(
            f"{str(folder)!r} holds a run with other settings: {told}. Resume with those of the run, or choose another "
            "output folder."
        )
    return progress, checkpoint
