"""Files and folders that appear whole or not at all, and that are read as they were written or not at all.

Adapters and selectors keep their weights in a safetensors file and everything else in a JSON file beside it. The JSON
file, written last, holds checksums of both, by which any later change is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


@contextmanager
def whole(final: Path, then: str = "try again") -> Iterator[Path]:
    """Give a path `<final>.partial` to write a file or a folder to. It takes the name `final` once all of it is on the disk.

    What was at `final` before stays until then. A process that is killed leaves a `.partial`, which the next one removes.

    Args:
        final: the path in the end; its folder must exist, unless the caller makes it for `<final>.partial`.
        then: what users are told to do when the cause of a failure is mended.

    Raises:
        OSError: it could not be written, say for want of space. Nothing is left of it.
    """
    partial = final.with_name(f"{final.name}.partial")
    _remove(partial)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        _remove(partial)
        raise OSError(
            f"Could not write {str(final)!r}: {error}. What was there before is as it was. Make room or mend the cause, "
            f"then {then}."
        ) from error
    _flush(final.parent)


PARTS = "task_*.safetensors"
"""The files for what is finished with each task, where something is written task by task."""


def part_file(position: int) -> str:
    """Name the file for the task at a position."""
    return PARTS.replace("*", f"{position + 1:04d}")


def link_or_copy(file: Path, to: Path) -> None:
    """Give a file, which nobody will ever change, a second name; where the file system has no such thing, copy it."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def drop(path: Path) -> None:
    """Remove a file or folder that `whole` made: under its name it is there whole or not at all.

    A process that is killed meanwhile leaves a `.partial`.
    """
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    os.replace(path, partial)
    _flush(path.parent)
    _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    if os.name != "posix":  # elsewhere a folder can't be opened, nor a file flushed that was opened for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------- reading strictly

CHECKSUMS = "checksums"
"""The key under which a JSON file holds the checksum of the weights beside it, and of its own fields."""
LISTED = 3  # tensors of a kind that an error message names


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file holds something else, or a key twice.
    """
    try:
        described = json.loads(Path(path).read_bytes(), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:  # what json and the decoder raise
        raise ValueError(f"{str(path)!r} is damaged: {error}. Save or download it anew.") from error
    if not isinstance(described, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object. Save or download it anew.")
    return described


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. Save or download it anew.") from error


def sealed(described: dict[str, Any], file: Path, weights: Path, unguarded: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a JSON file is to hold, with checksums by which `check_seal` notices that anything changed.

    Args:
        described: the fields.
        file: whose fields they are.
        weights: the file beside it, if there is one.
        unguarded: fields that users may edit, and that no output depends on.
    """
    sums = {weights.name: file_sum(weights)} if weights.is_file() else {}
    sums[file.name] = _fields_sum({**described, CHECKSUMS: dict(sums)}, unguarded)
    return {**described, CHECKSUMS: sums}


def check_seal(described: dict[str, Any], file: Path, unguarded: Iterable[str] = ()) -> None:
    """Check that a JSON file's fields are those that were written. One without checksums, of an older release, passes.

    Raises:
        ValueError: they are not.
    """
    sums = described.get(CHECKSUMS)
    if sums is None:
        return
    if not isinstance(sums, dict):
        raise ValueError(f"{str(file)!r} is damaged: its {CHECKSUMS!r} are {sums!r}. Save or download it anew.")
    others = {name: value for name, value in sums.items() if name != file.name}
    if sums.get(file.name) != _fields_sum({**described, CHECKSUMS: others}, unguarded):
        raise ValueError(
            f"{str(file)!r} is damaged or was edited: its fields do not have their checksum. Save or download it anew. "
            f"To keep an edit made on purpose, delete {CHECKSUMS!r} from the file."
        )


def check_weights_sum(described: dict[str, Any], file: Path, weights: Path) -> None:
    """Check that the weights are those that a JSON file was written for. One without their checksum passes.

    Raises:
        ValueError: they are not.
    """
    expected = (described.get(CHECKSUMS) or {}).get(weights.name)
    if expected is not None and expected != file_sum(weights):
        raise ValueError(
            f"{str(weights)!r} is damaged, or does not belong to {str(file)!r}: it does not have the checksum that "
            f"stands there. Save or download both anew. To keep a change made on purpose, delete {CHECKSUMS!r} from "
            f"{file.name!r}."
        )


def file_sum(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    described: str,
    may_be_minus_infinity: str = "",
) -> None:
    """Check that tensors can take the place of others: the same names, shapes and kinds of numbers, and all finite.

    Args:
        tensors: as read.
        expected: what they are to replace; on any device.
        described: what they must fit, for the message.

    Raises:
        ValueError: they can't.
    """
    shared = {name: (tensor, expected[name]) for name, tensor in tensors.items() if name in expected}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of a wrong shape": [
            f"{name} is {tuple(tensor.shape)}, expected {tuple(other.shape)}"
            for name, (tensor, other) in shared.items()
            if tensor.shape != other.shape
        ],
        "of a wrong type": [  # a header may call floats integers, of the same size; any precision of floats will do
            f"{name} is {tensor.dtype}, expected {other.dtype}"
            for name, (tensor, other) in shared.items()
            if tensor.dtype != other.dtype and not (tensor.is_floating_point() and other.is_floating_point())
        ],
        "not finite": not_finite(tensors),
    }
    told = [
        f"{len(names)} {what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise ValueError(
            f"These weights do not fit {described}. Tensors {'; '.join(told)}. The file is damaged, or made for another "
            "base model or configuration."
        )


def not_finite(tensors: Mapping[str, torch.Tensor], may_be_minus_infinity: str = "") -> list[str]:
    """List the names of tensors with NaN or infinite entries; those whose names end as said may hold minus infinity."""

    def bad(name: str, tensor: torch.Tensor) -> bool:
        if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
            return False
        if may_be_minus_infinity and name.endswith(may_be_minus_infinity):
            return bool((tensor.isnan() | tensor.isposinf()).any())
        return not bool(tensor.isfinite().all())

    return [name for name, tensor in tensors.items() if bad(name, tensor)]


def _fields_sum(described: dict[str, Any], unguarded: Iterable[str]) -> str:
    guarded = {name: value for name, value in described.items() if name not in set(unguarded)}
    return hashlib.sha256(json.dumps(guarded, sort_keys=True).encode()).hexdigest()


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)
