"""What shapes a result: all settings, the content of the data and the weights that a run starts from.

A run goes on, and stands in one table with others, only where all of this is the same, but for the number of processes, of
which a warning tells.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import CLIPProcessor

from .data.task import Task

PROCESSES = "processes"
"""The entry of a fingerprint that tells how many there are."""

MAY_DIFFER = frozenset(
    {
        "methods",  # which runs there are, and where; each run has its own seed beside its fingerprint
        "seeds",
        "output_dir",
        "resume",
        "stop_after",
        "data_dir",  # the content of the data is compared
        "cpu",  # the kind of device is compared
        "eval_batch_size",
        "log_with",
        "push_to_hub",
        "license",
    }
)
"""Settings that make no difference to what a run comes to. All others do."""


def fingerprint(
    tasks: Sequence[Task], clip: nn.Module, processor: CLIPProcessor, accelerator: Accelerator, *settings: Any
) -> dict[str, Any]:
    """Gather what shapes a result, as JSON can hold it.

    Args:
        tasks: the stream, with all images that few-shot ones are drawn from.
        clip: the pretrained model, before anything has changed it.
        processor: of the CLIP.
        accelerator: for processes, precision and kind of device.
        *settings: dataclasses with all that was set.
    """
    told: dict[str, Any] = {}
    for one in settings:
        told |= {name: value for name, value in asdict(one).items() if name not in MAY_DIFFER}
    told |= {
        "tasks": [task.name for task in tasks],
        PROCESSES: accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "data_content": _digest(*(task.content.encode() for task in tasks)),
        "model_content": model_content(clip, processor),
    }
    return json.loads(json.dumps(told))


def model_content(clip: nn.Module, processor: CLIPProcessor) -> str:
    """Hash a model's weights, and what its processor makes of images and texts."""
    parts = [processor.image_processor.to_json_string().encode()]
    parts.append(json.dumps(processor.tokenizer.get_vocab(), sort_keys=True).encode())
    for name, tensor in sorted(clip.state_dict().items()):
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return _digest(*parts)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List what differs between two fingerprints, each with its value then and now; empty if nothing does."""
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)


def differences_but_processes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List what else differs between the fingerprints of runs; where the number of processes does, warn of what follows."""
    then, here = before.get(PROCESSES), now.get(PROCESSES)
    changed = differences({**before, PROCESSES: here}, {**now, PROCESSES: here})
    if then is not None and then != here and not changed:
        warnings.warn(
            f"What was done before had {then} process{'es' if then > 1 else ''}, what follows has {here}. Images, their order, "
            "steps and learnt weights are the same; random crops, and noise of routers and dropout, are drawn by each "
            "process for itself, so these will be other draws. `results.json` tells, task by task, how many trained it.",
            stacklevel=3,
        )
    return changed


def _digest(*parts: Any) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()[:16]
