"""Fisher merging: each weight counts as much as the task's predictions depend on it (arXiv 2111.09832)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peft_moe_merge.model_merging.batches import images_of
from peft_moe_merge.model_merging.finetuned import TaskVectors, finetuned_model, precise
from peft_moe_merge.model_merging.logits import task_logits

from .registry import static_merge


@static_merge("fisher", "arXiv 2111.09832")
def fisher(
    base: nn.Module,
    vectors: TaskVectors,
    batches: Mapping[str, Iterable],
    heads: Mapping[str, torch.Tensor],
    images: int = 128,
    floor: float = 1e-6,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Average fine-tuned weights by the diagonal of each model's Fisher information on its own task.

    The diagonal is the mean squared gradient of `log p(y|x)`, one image at a time, with y drawn from the model's own
    prediction. A parameter that no prediction depends on is averaged evenly.

    Args:
        base: the pretrained model.
        vectors: what changed.
        batches: images of each task, in the forms that `adapt_routers` takes; labels are not looked at.
        heads: the normalised text features of each task's classes.
        images: images per task that the information is estimated from.
        floor: added to the information, as published, for weights that nothing depends on.
        seed: of the drawn classes.
    """
    names = vectors.changed()
    weighted = dict.fromkeys(names, 0.0)
    total = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for task in vectors.tasks:
        model = finetuned_model(base, vectors, task)
        parameters = {name: p.requires_grad_() for name, p in model.named_parameters() if name in names}
        information = {name: torch.zeros_like(precise(p)) for name, p in parameters.items()}
        used = 0
        for image in _single_images(task, batches[task], images):
            log_p = precise(task_logits(model, image, heads[task])).log_softmax(-1)[0]
            drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator).item()
            for name, gradient in zip(
                parameters,
                torch.autograd.grad(log_p[drawn], list(parameters.values()), allow_unused=True),
                strict=True,
            ):
                if gradient is not None:
                    information[name] += precise(gradient).square()  # float16 has no squares of small numbers
            used += 1
        for name, parameter in parameters.items():
            weight = information[name] / used + floor
            weighted[name] = weighted[name] + weight * precise(parameter.detach())
            total[name] = total[name] + weight
    return {name: weighted[name] / total[name] for name in names}


def _single_images(task: str, batches: Iterable[Any], count: int) -> Iterator[torch.Tensor]:
    given = 0
    for batch in batches:
        for image in images_of(batch):
            if given == count:
                return
            yield image[None]
            given += 1
    if not given:
        raise ValueError(f"`batches` has no images of task {task!r}.")
