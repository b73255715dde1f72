"""A selector on disk: `selector.safetensors` and `selector.json`, beside an adapter or on their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_moe_merge.files import whole

from .autoencoder import AutoencoderSelector
from .base import Selector
from .discriminant import DiscriminantSelector
from .features import source_from_dict
from .gaussian import GaussianSelector
from .prototypes import PrototypeSelector, TextSelector
from .ridge import RidgeSelector

SELECTORS: dict[str, type[Selector]] = {
    selector.kind: selector
    for selector in (
        GaussianSelector,
        DiscriminantSelector,
        RidgeSelector,
        AutoencoderSelector,
        PrototypeSelector,
        TextSelector,
    )
}
WEIGHTS = "selector.safetensors"
CONFIG = "selector.json"
FORMAT_VERSION = 1


def save_selector(selector: Selector, folder: str | Path) -> None:
    """Write a selector; the JSON file comes last, and each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"shared.{name}": tensor.contiguous() for name, tensor in selector.shared.items()}
    for position, own in enumerate(selector.own):
        tensors |= {f"tasks.{position}.{name}": tensor.contiguous() for name, tensor in own.items()}
    described = {
        "format_version": FORMAT_VERSION,
        "kind": selector.kind,
        "tasks": selector.tasks,
        "width": selector.width,
        "source": selector.source.to_dict(),
        "options": selector.options(),
    }
    with whole(folder / WEIGHTS) as partial:
        save_file(tensors, partial)
    with whole(folder / CONFIG) as partial:
        partial.write_text(json.dumps(described, indent=2))


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
    config, weights = (_file(folder, subfolder, name, hub) for name in (CONFIG, WEIGHTS))
    try:
        described = json.loads(Path(config).read_text())
        tensors = load_file(weights)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"The selector in {str(folder)!r} is damaged: {error}. Save or download it anew.") from error
    version = described.get("format_version", 0) if isinstance(described, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"The selector in {str(folder)!r} has format_version={version}; this release of peft_moe_merge reads up "
            f"to {FORMAT_VERSION}: `pip install -U peft-moe-merge`."
        )
    if described.get("kind") not in SELECTORS:
        raise ValueError(
            f"Unknown selector {described.get('kind')!r} in {str(folder)!r}; there are {list(SELECTORS)}."
        )
    try:
        selector = SELECTORS[described["kind"]](source_from_dict(described["source"]), **described["options"])
        selector.tasks, selector.width = list(described["tasks"]), described["width"]
    except (KeyError, TypeError) as error:
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
    selector.shared = {name.removeprefix("shared."): tensors[name] for name in sorted(shared & tensors.keys())}
    selector.own = [
        {name: tensors[f"tasks.{position}.{name}"] for name in (*selector.own_names, "threshold")}
        for position in range(len(selector.tasks))
    ]
    return selector


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
