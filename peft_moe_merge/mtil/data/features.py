"""What is seen in a task's training images when each is looked at once, as it is; several processes share them."""

# B images

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm
from transformers import BaseImageProcessor

from .batches import eval_batches
from .task import Task

Seen = TypeVar("Seen")


@torch.no_grad()
def labelled_features(
    task: Task,
    processor: BaseImageProcessor,
    see: Callable[[Tensor], Seen],
    batch_size: int = 64,
    num_workers: int = 0,
) -> Iterator[tuple[Seen, Tensor]]:
    """Go through a task's training images without augmentation: what is seen in them and their labels, batch by batch.

    Each process looks at one batch in so many, and gets what is seen in all, in the order of the images: as one would.

    Args:
        task: of which the images are.
        processor: of the CLIP.
        see: takes `pixel_values` B x 3 x H x W, on the CPU; what it returns is, too.
        batch_size: images that a process looks at together.
        num_workers: processes that decode.
    """
    state, count = PartialState(), len(task.train)
    own = [row for row in range(count) if row // batch_size % state.num_processes == state.process_index]
    batches = iter(eval_batches(task.train.select(own), processor, batch_size=batch_size, num_workers=num_workers))
    rounds = range(math.ceil(count / (batch_size * state.num_processes)))
    for _ in tqdm(rounds, desc=f"features of {task.name}", disable=not state.is_main_process, leave=False):
        batch = next(batches, None)  # in the last round some may have none
        yield from gather_object([] if batch is None else [(see(batch["pixel_values"]), batch["labels"])])
