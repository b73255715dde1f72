"""Test-time adaptation: routers learn, without labels, to make the merged model sure of its answers.

Shapes: B images, C classes, D feature width, T tasks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm import tqdm

from peft_moe_merge.files import whole
from peft_moe_merge.model_merging.logits import task_logits

from .config import WEMoEConfig
from .router import Router


def entropy(logits_BC: torch.Tensor, gates: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """Mean Shannon entropy of the predictions (arXiv 2402.00433, after AdaMerging, arXiv 2310.02575).

    Its minimum is reached as well by answering always the same class: on hard images adaptation can collapse.
    """
    return -(logits_BC.softmax(-1) * logits_BC.log_softmax(-1)).sum(-1).mean()


def mutual_information(logits_BC: torch.Tensor, gates: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """Entropy minus the entropy of the mean prediction: sure of each image, and of not always the same class.

    The negative mutual information of images and predictions (Krause et al., NIPS 2010; SHOT, arXiv 2002.08546).
    """
    mean_C = logits_BC.softmax(-1).mean(0)
    return entropy(logits_BC, gates, scaling) + torch.special.xlogy(mean_C, mean_C).sum()


def entropy_with_prior(logits_BC: torch.Tensor, gates: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """Entropy plus the mean squared distance of the gates from task arithmetic's constant `scaling`."""
    return entropy(logits_BC, gates, scaling) + torch.stack([((gate - scaling) ** 2).mean() for gate in gates]).mean()


LOSSES: dict[str, Callable[[torch.Tensor, list[torch.Tensor], float], torch.Tensor]] = {
    "entropy": entropy,
    "mutual_information": mutual_information,
    "entropy_with_prior": entropy_with_prior,
}


@contextmanager
def recorded_gates(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the gates `[B, T]` of every router call inside the context, in the order of the calls."""
    gates: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: gates.append(output))
        for module in model.modules()
        if isinstance(module, Router)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def adapt_routers(
    model: PeftModel,
    unlabelled: Mapping[str, Iterable],
    steps: int = 1000,
    *,
    heads: Mapping[str, torch.Tensor] | None = None,
    loss: str = "entropy",
    lr: float = 1e-4,
    schedule: str = "cosine",
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train the routers of the active adapter on unlabelled images (arXiv 2402.00433).

    Each step takes one batch of every task, whose task is thereby known, and adds up the tasks' losses; one task's
    graph is gone before the next one's is built. The model's mode (train or eval) is left as it was.

    Args:
        model: from `merge_finetuned`, or loaded.
        unlabelled: for each task the batches to adapt to, run through again and again. With `heads`, batches are
            `pixel_values`, alone, first in a tuple, or by that name; without, they are keyword arguments of the model
            (for CLIP with the class prompts as `input_ids`). Labels are not looked at. A `DataLoader` may shuffle;
            for a reproducible run nothing else than torch's generators should be random.
        steps: optimizer steps.
        heads: for each task the normalised text features of its classes, `[C, D]`.
        loss: `"entropy"` as published, `"mutual_information"` or `"entropy_with_prior"`, which resist collapse; none
            helps a model whose predictions are mostly wrong.
        lr: Adam's learning rate.
        schedule: `"cosine"` to zero over `steps`, or `"constant"`.
        seed: of the order of images.
        checkpoint: a file that is written every `checkpoint_every` steps and at the end. If it exists the run goes on
            from there, to the same result as without the stop.
        checkpoint_every: steps between checkpoints.
        progress: show a progress bar.

    Returns:
        For each step run now: `step`, `loss` (summed over tasks), `lr`, and each task's loss as `loss/<task>`.

    Raises:
        ValueError: no data, a task that the adapter does not have, a missing head, an unknown loss or schedule, an
            adapter without trainable routers, a checkpoint of another run.
        FloatingPointError: the loss is not finite; routers are as they were after the last good step.
    """
    config = model.peft_config[model.active_adapter]
    _check(config, unlabelled, heads, loss, schedule)
    routers = {name: p for name, p in model.named_parameters() if p.requires_grad and ".wemoe_router." in name}
    if not routers:
        raise ValueError(
            f"the adapter {model.active_adapter!r} has no trainable router: it was built with router='projection', "
            "which needs no adaptation, or loaded without `is_trainable=True`."
        )
    settings = {"loss": loss, "lr": lr, "schedule": schedule, "steps": steps, "seed": seed, "tasks": list(unlabelled)}
    optimizer = torch.optim.Adam(routers.values(), lr=lr)
    done = _load_checkpoint(checkpoint, routers, optimizer, settings) if checkpoint is not None else 0
    batches = {
        task: endless(loader, task, seed=seed + 1009 * position, start=done)
        for position, (task, loader) in enumerate(unlabelled.items())
    }

    was_training = model.training
    model.eval()
    history = []
    try:
        for step in tqdm(range(done, steps), initial=done, total=steps, desc="adapting routers", disable=not progress):
            rate = lr * (0.5 * (1 + math.cos(math.pi * step / steps)) if schedule == "cosine" else 1.0)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            row: dict[str, float] = {"step": step, "lr": rate}
            for task, batch in ((task, next(batches[task])) for task in batches):
                with recorded_gates(model) as gates:
                    logits = task_logits(model, batch, heads[task] if heads is not None else None)
                    task_loss = LOSSES[loss](logits.float(), gates, config.scaling)
                task_loss.backward()
                row[f"loss/{task}"] = task_loss.item()
            row["loss"] = sum(value for key, value in row.items() if key.startswith("loss/"))
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss at step {step} is {row}; try a smaller `lr` than {lr}.")
            optimizer.step()
            history.append(row)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == steps):
                _save_checkpoint(checkpoint, routers, optimizer, {**settings, "done": step + 1})
    finally:
        model.train(was_training)
    return history


def _check(
    config: WEMoEConfig,
    unlabelled: Mapping[str, Iterable],
    heads: Mapping[str, torch.Tensor] | None,
    loss: str,
    schedule: str,
) -> None:
    if not isinstance(config, WEMoEConfig):
        raise ValueError(f"adapt_routers needs a WEMoE adapter, the active one is {type(config).__name__}.")
    if not unlabelled:
        raise ValueError(f"there is no data to adapt to; expected {{task: batches}} for some of {config.tasks}.")
    if unknown := [task for task in unlabelled if task not in config.tasks]:
        raise ValueError(f"the adapter has no task {unknown}; its tasks are {config.tasks}.")
    if empty := [task for task, batches in unlabelled.items() if hasattr(batches, "__len__") and len(batches) == 0]:
        raise ValueError(f"there are no batches to adapt to for {empty}; drop the task or give it images.")
    if heads is not None and (missing := [task for task in unlabelled if task not in heads]):
        raise ValueError(f"`heads` lacks the class text features of {missing}; it has those of {list(heads)}.")
    if loss not in LOSSES:
        raise ValueError(f"there is no loss {loss!r}; choose one of {list(LOSSES)}.")
    if schedule not in ("cosine", "constant"):
        raise ValueError(f"there is no schedule {schedule!r}; choose 'cosine' or 'constant'.")


def endless(loader: Iterable, task: str, seed: int, start: int = 0) -> Iterator[Any]:
    """Yield batches number `start` and on of a loader that is run through again and again.

    What the loader draws from torch's generators depends on the seed and the number of the batch alone, so that a
    run that was stopped sees the images that it would have seen.
    """
    number = 0
    while True:
        if isinstance(loader, DataLoader) and loader.generator is not None:
            loader.generator.manual_seed(seed + 100_003 * number)
        iterator, first = None, number
        while True:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + 100_003 * number)
                iterator = iter(loader) if iterator is None else iterator
                batch = next(iterator, None)
            if batch is None:
                break
            if number >= start:
                yield batch
            number += 1
        if number == first:
            raise ValueError(
                f"the batches of task {task!r} are used up; give a list or a DataLoader, not an iterator."
            )


def _save_checkpoint(
    path: str | os.PathLike, routers: Mapping[str, torch.Tensor], optimizer: torch.optim.Adam, settings: dict
) -> None:
    tensors = {}
    for name, parameter in routers.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    path, tensors = Path(path), {name: tensor.contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        save_file(tensors, partial, {"run": json.dumps(settings)})


def _load_checkpoint(
    path: str | os.PathLike, routers: Mapping[str, torch.Tensor], optimizer: torch.optim.Adam, settings: dict
) -> int:
    """Restore routers and optimizer in place, and return the number of steps done (0 without a file)."""
    if not Path(path).exists():
        return 0
    with safe_open(path, "pt") as file:
        saved = json.loads(file.metadata()["run"])
        done = saved.pop("done")
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        expected = {f"parameter/{name}": list(parameter.shape) for name, parameter in routers.items()}
        if saved != settings or any(shapes.get(name) != shape for name, shape in expected.items()):
            raise ValueError(
                f"{path} is the checkpoint of another run ({saved}), this one is {settings}: choose another file, or "
                "delete it to start anew."
            )
        with torch.no_grad():
            for name, parameter in routers.items():
                parameter.copy_(file.get_tensor(f"parameter/{name}"))
                optimizer.state[parameter] = {
                    key: file.get_tensor(f"{key}/{name}").to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return done
