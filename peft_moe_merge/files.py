"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


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
