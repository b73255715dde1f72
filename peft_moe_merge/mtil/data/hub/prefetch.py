"""Load the benchmark ahead of a run: `python -m peft_moe_merge.mtil.data.hub.prefetch`.

With `--peek` nothing is kept: the first images of every split are streamed, to see what a repository holds.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from datasets import ClassLabel
from PIL.Image import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from .load import check_images, load_hub_task, load_reference_images, load_splits, open_copy
from .table import HUB_SETS, REFERENCE, REFERENCE_SET, class_names


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_moe_merge.mtil.data.hub.prefetch", description=__doc__)
    parser.add_argument("tasks", nargs="*", default=[*HUB_SETS], help=f"any of {', '.join(HUB_SETS)}; default: all")
    parser.add_argument("--reference", action="store_true", help=f"also {REFERENCE_SET.hub_id}, the reference set")
    parser.add_argument("--data_dir", help="check local copies, <data_dir>/<task>, instead")
    parser.add_argument("--verify", action="store_true", help="decode every image")
    parser.add_argument("--peek", type=int, metavar="N", help="stream the first N images of each split, keep nothing")
    parser.add_argument("--force_download", action="store_true", help="do not trust the files in the cache")
    parser.add_argument("--allow_size_mismatch", action="store_true", help="do not mind other numbers of images")
    arguments = parser.parse_args()
    unknown = [task for task in arguments.tasks if task not in HUB_SETS]
    if unknown:
        parser.error(f"no task {', '.join(map(repr, unknown))}; there are {', '.join(HUB_SETS)}")

    names = [*arguments.tasks, *([REFERENCE] if arguments.reference else [])]
    table = Table(*("task", "repository", "revision", "classes", "train", "test", "licence", ""), box=None)
    failures = []
    for name in (bar := tqdm(names, unit="set")):
        bar.set_postfix_str(name)
        entry = HUB_SETS.get(name, REFERENCE_SET)
        try:
            if arguments.peek:
                _peek(name, arguments)
                train, test, told = "", "", "peeked"
            else:
                train, test, told = *_fetch(name, arguments), "ready"
        except (OSError, ValueError) as error:
            failures.append(str(error))
            train, test, told = "", "", "failed"
        row = (name, entry.hub_id, (entry.revision or "newest")[:8], str(len(class_names(name))), train, test)
        table.add_row(*map(escape, (*row, entry.licence, told)))
    console = Console()
    console.width = max(console.width, 130)
    console.print(table)
    console.print("Licences as far as known; what a repository says of itself takes precedence.")
    if failures:
        sys.exit("\n\n".join(failures))


def _fetch(name: str, arguments: argparse.Namespace) -> tuple[str, str]:
    options = {"data_dir": arguments.data_dir, "force_download": arguments.force_download}
    entry = HUB_SETS.get(name, REFERENCE_SET)
    if arguments.verify:
        check_images(name, entry.image, load_splits(name, entry, **options))
        options["force_download"] = False
    options["allow_size_mismatch"] = arguments.allow_size_mismatch
    if name == REFERENCE:
        return f"{len(load_reference_images(**options)):,}", "-"
    task = load_hub_task(name, **options)
    return f"{len(task.train):,}", f"{len(task.test):,}"


def _peek(name: str, arguments: argparse.Namespace) -> None:
    """Tell columns, image sizes and modes, and labels of the first rows of each split, whatever they are called."""
    entry = HUB_SETS.get(name, REFERENCE_SET)
    for split, stream in open_copy(name, entry, data_dir=arguments.data_dir, streaming=True).items():
        rows = list(stream.take(arguments.peek))
        images = Counter(f"{v.mode} {v.size}" for row in rows for v in row.values() if isinstance(v, Image))
        feature, labels = (stream.features or {}).get(entry.label), [row.get(entry.label) for row in rows]
        if isinstance(feature, ClassLabel):
            labels = [feature.names[label] for label in labels]
        tqdm.write(f"{name}, {split}: columns {list(stream.features or rows[0])}; images {dict(images)}; {labels}")


if __name__ == "__main__":
    main()
