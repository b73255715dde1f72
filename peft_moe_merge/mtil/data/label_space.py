"""Which classes an image is told apart among: those of its own task, or those of all tasks of a stream.

Shapes: K classes of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_moe_merge.inference.zero_shot import prompts_of
from peft_moe_merge.selection.candidates import same_name

from .task import Task


@dataclass(frozen=True)
class LabelSpace:
    """Classes to tell images apart among.

    Attributes:
        names: of the classes.
        prompts: of each class, at least one.
        columns: which class each label of a task is, by the task's name: LongTensor[K].
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    columns: dict[str, Tensor]

    @classmethod
    def of_task(cls, task: Task) -> LabelSpace:
        """Take the classes of a task as they are."""
        prompts = prompts_of(task.class_names, task.templates)
        return cls(task.class_names, tuple(map(tuple, prompts)), {task.name: torch.arange(len(prompts))})

    @classmethod
    def of_all(cls, tasks: Sequence[Task]) -> LabelSpace:
        """Take the classes of all tasks, each name once; names that differ in case or underscores alone are one.

        So an image is classified rightly when the name is right, whichever task the name was learnt in. A class that
        several tasks have is prompted by the templates of all of them, each prompt once.
        """
        rows: dict[str, int] = {}
        names: list[str] = []
        prompts: list[dict[str, None]] = []
        columns: dict[str, Tensor] = {}
        for task in tasks:
            of_task = []
            for name, of_class in zip(task.class_names, prompts_of(task.class_names, task.templates), strict=True):
                row = rows.setdefault(same_name(name), len(rows))
                if row == len(names):
                    names.append(name)
                    prompts.append({})
                prompts[row] |= dict.fromkeys(of_class)
                of_task.append(row)
            columns[task.name] = torch.tensor(of_task)
        return cls(tuple(names), tuple(map(tuple, prompts)), columns)
