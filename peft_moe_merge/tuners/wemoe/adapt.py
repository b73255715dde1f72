"""Test-time adaptation: routers learn, without labels, to make the merged model sure of its answers.

Shapes: B images, C classes, D feature width, T tasks.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from peft_moe_merge.files import check_tensors, whole
from peft_moe_merge.model_merging.adaptation import Adaptation
from peft_moe_merge.model_merging.batches import endless
from peft_moe_merge.model_merging.logits import task_logits
from peft_moe_merge.model_merging.losses import loss_of

from .config import WEMoEConfig
from .context import recorded_gates


def distance_from_prior(gates: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """Return the mean squared distance of gates from task arithmetic's constant `scaling`, which resists collapse."""
    return torch.stack([((gate - scaling) ** 2).mean() for gate in gates]).mean()


def adapt_routers(
    model: PeftModel,
    unlabelled: Mapping[str, Iterable],
    how: Adaptation | None = None,
    *,
    heads: Mapping[str, torch.Tensor] | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
    **earlier: Any,
) -> list[dict[str, float]]:
    """Train the routers of the active adapter on unlabelled images (arXiv 2402.00433).

    Each step takes one batch of every task, whose task is thereby known, and adds up the tasks' losses; one task's
    graph is gone before the next one's is built. The model's mode (train or eval) is left as it was.

    Args:
        model: from `merge_finetuned`, or loaded.
        unlabelled: for each task the batches to adapt to, run through again and again. With `heads`, batches are
            `pixel_values`, alone, first in a tuple, or by that name; without, they are keyword arguments of the model
            (for CLIP with the class prompts as `input_ids`). Labels are looked at with `loss="cross_entropy"` alone. A `DataLoader` may shuffle;
            for a reproducible run nothing else than torch's generators should be random.
        how: steps, loss, learning rate, seed.
        heads: for each task the normalised text features of its classes, `[C, D]`.
        checkpoint: a file that is written every `checkpoint_every` steps and at the end. If it exists the run goes on
            from there, to the same result as without the stop.
        checkpoint_every: steps between checkpoints.
        progress: show a progress bar.
        **earlier: settings of `how` by their names, as earlier releases took them.

    Returns:
        For each step run now: `step`, `loss` (summed over tasks), `lr`, and each task's loss as `loss/<task>`.

    Raises:
        ValueError: no data, a task that the adapter does not have, a missing head, no labels where the loss
            needs them, an adapter without trainable routers, a checkpoint of another run.
        FloatingPointError: the loss is not finite; routers are as they were after the last good step.
    """
    config = model.peft_config[model.active_adapter]
    _check(config, unlabelled, heads)
    how = Adaptation.told(how, earlier, Adaptation())
    routers = {name: p for name, p in model.named_parameters() if p.requires_grad and ".wemoe_router." in name}
    if not routers:
        raise ValueError(
            f"the adapter {model.active_adapter!r} has no trainable router: it was built with gates='projection', "
            "which needs no adaptation, or loaded without `is_trainable=True`."
        )
    settings = {**asdict(how), "tasks": list(unlabelled)}
    optimizer = torch.optim.Adam(routers.values(), lr=how.lr)
    done = _load_checkpoint(checkpoint, routers, optimizer, settings) if checkpoint is not None else 0
    schedule = how.scheduler(optimizer, done)
    batches = {
        task: endless(loader, task, seed=how.seed + 1009 * position, start=done)
        for position, (task, loader) in enumerate(unlabelled.items())
    }

    was_training = model.training
    model.eval()
    history = []
    try:
        for step in tqdm(
            range(done, how.steps), initial=done, total=how.steps, desc="adapting routers", disable=not progress
        ):
            optimizer.zero_grad()
            row: dict[str, float] = {"step": step, "lr": optimizer.param_groups[0]["lr"]}
            for task, batch in ((task, next(batches[task])) for task in batches):
                with recorded_gates() as gates:
                    logits = task_logits(model, batch, heads[task] if heads is not None else None)
                task_loss = loss_of(how.loss.removesuffix("_with_prior"), logits, batch)
                if how.loss == "entropy_with_prior":
                    task_loss = task_loss + distance_from_prior(gates, config.scaling)
                del gates, logits
                task_loss.backward()
                row[f"loss/{task}"] = task_loss.item()
            row["loss"] = sum(value for key, value in row.items() if key.startswith("loss/"))
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(f"the loss at step {step} is {row}; try a smaller `lr` than {how.lr}.")
            optimizer.step()
            schedule.step()
            history.append(row)
            if checkpoint is not None and ((step + 1) % checkpoint_every == 0 or step + 1 == how.steps):
                _save_checkpoint(checkpoint, routers, optimizer, {**settings, "done": step + 1})
    finally:
        model.train(was_training)
    return history


def _check(
    config: WEMoEConfig,
    unlabelled: Mapping[str, Iterable],
    heads: Mapping[str, torch.Tensor] | None,
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
    try:
        with safe_open(path, "pt") as file:
            saved = json.loads(file.metadata()["run"])
            done = saved.pop("done")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error!r}. Delete it to start anew.") from error
    if saved != settings:
        raise ValueError(
            f"{path} is the checkpoint of another run ({saved}), this one is {settings}: choose another file, or "
            "delete it to start anew."
        )
    expected = {}
    for name, parameter in routers.items():
        moments = dict.fromkeys((f"parameter/{name}", f"exp_avg/{name}", f"exp_avg_sq/{name}"), parameter)
        expected |= {**moments, f"step/{name}": torch.zeros(())}
    try:
        check_tensors(tensors, expected, "the adapter's routers")
    except ValueError as error:
        raise ValueError(f"{str(path)!r}: {error} Choose another file, or delete it to start anew.") from error
    with torch.no_grad():
        for name, parameter in routers.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            optimizer.state[parameter] = {
                key: tensors[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return done
