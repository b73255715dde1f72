"""A selector on disk: `selector.safetensors` and `selector.json`, beside an adapter or on their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from peft_moe_merge.files import (
    CHECKSUMS,
    check_seal,
    check_weights_sum,
    not_finite,
    part_file,
    read_json,
    read_tensors,
    sealed,
    whole,
)
from peft_moe_merge.registry import discover

from .base import Selector
from .features import source_from_dict

SELECTORS: dict[str, type[Selector]] = discover(sys.modules[__package__], Selector, "kind")
"""All in this folder, by their `kind`."""
WEIGHTS = "selector.safetensors"
CONFIG = "selector.json"
FORMAT_VERSION = 1


def save_selector(selector: Selector, folder: str | Path, *, in_parts: bool = False) -> None:
    """Write a selector; the JSON file comes last, and each file appears whole or not at all.

    Args:
        selector: to be written.
        folder: where; it is made if it is missing.
        in_parts: what is kept of a task, all but its threshold, gets a file of its own, see `part_file`. A part that the
            folder holds already is not written anew: nothing in it changes once the next task is fitted.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"shared.{name}": tensor.contiguous() for name, tensor in selector.shared.items()}
    for position, own in enumerate(selector.own):
        of_task = {f"tasks.{position}.{name}": tensor.contiguous() for name, tensor in own.items()}
        if in_parts:
            tensors |= {f"tasks.{position}.threshold": of_task.pop(f"tasks.{position}.threshold")}
            if not (part := folder / part_file(position)).exists():
                with whole(part) as partial:
                    save_file(of_task, partial)
        else:
            tensors |= of_task
    described = {
        "format_version": FORMAT_VERSION,
        "kind": selector.kind,
        "tasks": selector.tasks,
        "width": selector.width,
        "source": selector.source.to_dict(),
        "options": selector.options(),
        **({"in_parts": True} if in_parts else {}),
    }
    with whole(folder / WEIGHTS) as partial:
        save_file(tensors, partial)
    with whole(folder / CONFIG) as partial:
        partial.write_text(json.dumps(sealed(described, folder / CONFIG, folder / WEIGHTS), indent=2))


def load_selector(folder: str | Path, subfolder: str | None = None, **hub: Any) -> Selector:
    """Read a selector from a folder, or from a repository on the Hub. Only JSON and safetensors are read.

    Args:
        folder: a folder, or the id of a repository.
        subfolder: where in it the files are.
        hub: passed to `huggingface_hub.hf_hub_download`, such as `revision` and `token`.

    Raises:
        FileNotFoundError: there is no selector.
        ValueError: its files are damaged, of a newer release, or do not fit one another.
    """
    config, weights = (Path(_file(folder, subfolder, name, hub)) for name in (CONFIG, WEIGHTS))
    described = read_json(config)
    version = described.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{str(config)!r} has format_version={version}; this release of peft_moe_merge reads up "
            f"to {FORMAT_VERSION}: `pip install -U peft-moe-merge`."
        )
    check_seal(described, config)
    check_weights_sum(described, config, weights)
    tensors = read_tensors(weights)
    for position in range(len(described.get("tasks", ())) if described.get("in_parts") else 0):
        tensors |= read_tensors(Path(_file(folder, subfolder, part_file(position), hub)))
    if described.get("kind") not in SELECTORS:
        raise ValueError(
            f"Unknown selector {described.get('kind')!r} in {str(config)!r}; there are {list(SELECTORS)}."
        )
    try:
        selector = SELECTORS[described["kind"]](source_from_dict(described["source"]), **described["options"])
        selector.tasks, selector.width = list(described["tasks"]), described["width"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{CONFIG} in {str(folder)!r} is damaged: {error!r}.") from error
    expected = {
        f"tasks.{position}.{name}"
        for position in range(len(selector.tasks))
        for name in (*selector.own_names, "threshold")
    }
    shared = {f"shared.{name}" for name in selector.shared_names}
    if tensors.keys() - shared != expected:
        raise ValueError(
            f"{WEIGHTS} in {str(folder)!r} does not fit {CONFIG}: of the tensors of {len(selector.tasks)} tasks "
            f"{sorted(expected - tensors.keys())[:3]} are missing, {sorted(tensors.keys() - shared - expected)[:3]} "
            "are unexpected."
        )
    if bad := not_finite(tensors, may_be_minus_infinity=".threshold"):
        raise ValueError(f"{WEIGHTS} in {str(folder)!r} is damaged: {bad[:3]} are not finite.")
    selector.shared = {name.removeprefix("shared."): tensors[name] for name in sorted(shared & tensors.keys())}
    selector.own = [
        {name: tensors[f"tasks.{position}.{name}"] for name in (*selector.own_names, "threshold")}
        for position in range(len(selector.tasks))
    ]
    if CHECKSUMS not in described and selector.tasks:
        _try_out(selector, weights)
    return selector


def _try_out(selector: Selector, weights: Path) -> None:
    """Score one image: tensors of wrong shapes show here, where no checksum tells, as in files of release 0.1."""
    kept = [*selector.shared.items(), *(item for own in selector.own for item in own.items())]
    mistyped = [name for name, tensor in kept if tensor.is_floating_point() == (name in selector.integer_names)]
    if mistyped:
        raise ValueError(f"{str(weights)!r} is damaged: it holds numbers of another kind in {mistyped[0]!r}.")
    try:
        scores_BT, _ = selector.judge(torch.zeros(1, selector.width))
        fits = scores_BT.shape == (1, len(selector.tasks)) and bool(scores_BT.isfinite().all())
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ValueError(f"{str(weights)!r} does not fit {CONFIG!r}: {error!r}.") from error
    if not fits:
        raise ValueError(f"{str(weights)!r} does not fit {CONFIG!r}: its scores are not finite.")


def _file(folder: str | Path, subfolder: str | None, name: str, hub: dict[str, Any]) -> str | Path:
    path = Path(folder, subfolder or "", name)
    if path.is_file():
        return path
    if Path(folder).is_dir():
        raise FileNotFoundError(f"No {name} in {str(path.parent)!r}: there is no selector, or half of one.")
    try:
        return hf_hub_download(str(folder), name, subfolder=subfolder, **hub)
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"No {name} in the repository {str(folder)!r}.") from error
