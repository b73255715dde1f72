"""What the classes of an adapter's tasks are called, and the file beside it that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from peft_moe_merge.files import whole
from peft_moe_merge.selection.candidates import check_candidates

ANY_CLASS = ("a photo of a {}.",)
"""Prompt forms of a class that no task has."""

CLASSES_FILE = "classifier.json"
"""Beside an adapter: what its tasks' classes are called."""


@dataclass(frozen=True)
class TaskClasses:
    """What the images of a task may be.

    Attributes:
        class_names: in plain words.
        templates: prompt forms with one `{}` for the class name; their features are averaged.
    """

    class_names: Sequence[str]
    templates: Sequence[str] = ANY_CLASS

    def __post_init__(self):
        if isinstance(self.class_names, str) or not self.class_names:
            raise ValueError(f"`class_names` must be a list of at least one name, got {self.class_names!r}.")
        check_candidates(self.class_names)
        if isinstance(self.templates, str) or not self.templates or any("{}" not in form for form in self.templates):
            raise ValueError(f"`templates` must be a list of texts with a '{{}}' in each, got {self.templates!r}.")
        for name in ("class_names", "templates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


def as_task_classes(classes: TaskClasses | Sequence[str]) -> TaskClasses:
    """Take names alone as classes with the usual prompt."""
    return classes if isinstance(classes, TaskClasses) else TaskClasses(classes)


def write_classes(
    folder: str | os.PathLike, tasks: Mapping[str, TaskClasses], open_classes: TaskClasses | None = None
) -> None:
    """Write the classes of an adapter's tasks beside it."""
    told = {
        "tasks": {name: asdict(classes) for name, classes in tasks.items()},
        "open_classes": None if open_classes is None else asdict(open_classes),
    }
    with whole(Path(folder, CLASSES_FILE)) as partial:
        partial.write_text(json.dumps(told, indent=1))


def read_classes(adapter: str | os.PathLike, **download: Any) -> tuple[dict[str, TaskClasses], TaskClasses | None]:
    """Read what `write_classes` wrote: the classes of the tasks, and those of no task if they were named.

    Args:
        adapter: folder, or name on the Hub.
        download: `subfolder`, `revision`, `token`, ... of the adapter.

    Raises:
        FileNotFoundError: there is no such file in the folder.
        ValueError: it is damaged.
    """
    if os.path.isdir(adapter):
        classes_file = Path(adapter, download.get("subfolder") or "", CLASSES_FILE)
    else:
        classes_file = Path(hf_hub_download(adapter, CLASSES_FILE, **download))
    if not classes_file.is_file():
        raise FileNotFoundError(
            f"{str(adapter)!r} has no {CLASSES_FILE}: `ContinualClassifier.save_pretrained` did not write it. Load the "
            "adapter by PEFT, and name the classes of its tasks to the constructor."
        )
    try:
        told = json.loads(classes_file.read_text())
        tasks = {name: TaskClasses(**classes) for name, classes in told["tasks"].items()}
        open_classes = None if told["open_classes"] is None else TaskClasses(**told["open_classes"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CLASSES_FILE} in {str(adapter)!r} is damaged: {error!r}. Save or download it anew."
        ) from error
    return tasks, open_classes
