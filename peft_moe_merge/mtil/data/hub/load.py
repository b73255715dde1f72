"""From a copy of a data set to a task: download or open, check, map labels by name, split. No image is copied."""

from __future__ import annotations

import errno
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
)
from torch.utils.data import random_split
from tqdm import tqdm

from ..defects import defect, listed, refuse_null_images
from ..rgb import RGBImage
from ..task import Task, labels_of
from ..templates import templates_for
from .table import HUB_SETS, REFERENCE, REFERENCE_SET, HubSet, class_names


def load_hub_task(
    name: str,
    *,
    data_dir: str | Path | None = None,
    few_shot: bool = False,
    allow_size_mismatch: bool = False,
    force_download: bool = False,
) -> Task:
    """Load a task of the benchmark from the Hub, its cache, or a local copy.

    Args:
        name: a key of `HUB_SETS`.
        data_dir: folder with a copy of each repository, `<data_dir>/<name>`; None asks the Hub, and its cache if the
            environment says `HF_HUB_OFFLINE=1`.
        few_shot: give the task the learning rate for few images.
        allow_size_mismatch: go on with other numbers of images than the benchmark's.
        force_download: do not trust files in the cache.

    Raises:
        ConnectionError: no network, and nothing in the cache.
        PermissionError: the repository wants its conditions accepted first, or another user.
        OSError: no space left on the disk.
        FileNotFoundError: no such repository, revision or folder.
        ValueError: files that can't be read, missing splits or columns, labels that fit no class, rows without an image,
            images that can't be read (a few are tried), other numbers of images.
    """
    entry = HUB_SETS[name]
    splits = load_splits(name, entry, data_dir=data_dir, force_download=force_download)
    check_images(name, entry.image, splits, few=True)
    used = {split: _with_class_labels(name, entry, split, dataset) for split, dataset in splits.items()}
    train, test = _train_and_test(entry, used)
    if not allow_size_mismatch:
        _check_sizes((len(train), len(test)), splits, name, entry, _place(entry, name, data_dir))
    return Task(
        name=name,
        class_names=tuple(class_names(name)),
        templates=templates_for(name),
        train=train,
        test=test,
        lr=entry.lr_few_shot if few_shot else entry.lr,
    )


def load_reference_images(
    *, data_dir: str | Path | None = None, allow_size_mismatch: bool = False, force_download: bool = False
) -> Dataset:
    """Load the images of the reference set, without labels; arguments and errors are those of `load_hub_task`."""
    entry = REFERENCE_SET
    splits = load_splits(REFERENCE, entry, data_dir=data_dir, force_download=force_download)
    check_images(REFERENCE, entry.image, splits, few=True)
    images = splits[entry.train].select_columns(entry.image).rename_columns({entry.image: "image"})
    images = images.cast_column("image", RGBImage())
    if not allow_size_mismatch:
        _check_sizes((len(images), 0), splits, REFERENCE, entry, _place(entry, REFERENCE, data_dir))
    return images


def load_splits(
    name: str, entry: HubSet, *, data_dir: str | Path | None = None, force_download: bool = False
) -> dict[str, Dataset]:
    """Load the splits that an entry uses, as they are; see `load_hub_task`."""
    found = open_copy(name, entry, data_dir=data_dir, force_download=force_download)
    place = _place(entry, name, data_dir)
    wanted = [split for split in f"{entry.train}+{entry.test}".split("+") if split]
    missing = [split for split in wanted if split not in found]
    if missing:
        raise ValueError(f"{name!r}: no split {', '.join(map(repr, missing))} in {place}; there are {list(found)}.")
    for split in wanted:
        columns = found[split].column_names
        absent = [column for column in (entry.image, entry.label) if column not in columns]
        if absent:
            raise ValueError(
                f"{name!r}: no column {', '.join(map(repr, absent))} in split {split!r} of {place}; there are {columns}."
            )
    return {split: found[split] for split in wanted}


def open_copy(
    name: str,
    entry: HubSet,
    *,
    data_dir: str | Path | None = None,
    force_download: bool = False,
    streaming: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """Open all splits of a copy; `streaming` keeps nothing on disk. For the rest see `load_hub_task`."""
    try:
        if data_dir is None:
            mode = "force_redownload" if force_download else None
            options = {"revision": entry.revision, "download_mode": mode, "streaming": streaming}
            return load_dataset(entry.hub_id, entry.config, **options)
        folder = Path(data_dir) / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"No folder {str(folder)!r}. Expected a copy of the repository there: "
                f"`hf download --repo-type dataset {entry.hub_id} --local-dir {folder}`."
            )
        return load_dataset(str(folder), streaming=streaming)
    except Exception as error:
        raise _explained(error, name, entry, _place(entry, name, data_dir)) from error


def check_images(name: str, column: str, splits: dict[str, Dataset], *, few: bool = False) -> None:
    """See that every row has an image, and decode them, with a bar; or only the first, middle and last of each split.

    Raises:
        ValueError: some are missing or can't be read; with the data set, split and row of each.
    """
    for split, dataset in splits.items():
        refuse_null_images(name, split, dataset, column)
    defects = []
    for split, dataset in splits.items():
        raw = dataset.select_columns(column).cast_column(column, Image(decode=False))
        rows = sorted({0, len(raw) // 2, len(raw) - 1} & {*range(len(raw))}) if few else range(len(raw))
        with (
            ThreadPoolExecutor() as pool,
            tqdm(total=len(rows), desc=f"{name} {split}", leave=False, disable=few) as bar,
        ):
            for start in range(0, len(rows), 256):
                part = rows[start : start + 256]
                files = (
                    image["path"] if image["bytes"] is None else BytesIO(image["bytes"]) for image in raw[part][column]
                )
                for row, error in zip(part, pool.map(defect, files), strict=True):
                    defects += [f"{name}, split {split!r}, row {row}: {error}"] if error else []
                bar.update(len(part))
    if defects:
        raise ValueError(
            f"{name!r} has {len(defects)} images that can't be read. Load it anew by `force_download` "
            f"(`--force_download` of the prefetch command); if they stay, the copy itself is damaged:\n  {listed(defects)}"
        )


def match_class_names(name: str, found: Iterable[str], without: tuple[str, ...] = ()) -> dict[str, int]:
    """Map a copy's class names to class numbers, by name: case, accents and punctuation do not count.

    Args:
        name: the task.
        found: the copy's class names.
        without: names that are left out.

    Returns:
        Class numbers, which are positions in `class_names(name)`, by the copy's names.

    Raises:
        ValueError: names without a class, or classes without a name; both side by side.
    """
    known = class_names(name)
    numbers = {_plain(word): number for number, (ours, others) in enumerate(known.items()) for word in (ours, *others)}
    left_out = {_plain(word) for word in without}
    found = [word for word in found if _plain(word) not in left_out]
    matched = {word: numbers[_plain(word)] for word in found if _plain(word) in numbers}
    lacking = [ours for number, ours in enumerate(known) if number not in matched.values()]
    foreign = [word for word in found if word not in matched]
    twice = len(matched) - len(set(matched.values()))
    if lacking or foreign or twice:
        width = max(len("class of the task"), *map(len, known))
        rows = zip_longest(["class of the task", *lacking], ["name in the copy", *foreign], fillvalue="")
        table = "\n".join(f"  {ours:{width}} | {theirs}" for ours, theirs in rows)
        raise ValueError(
            f"{name!r}: {len(lacking)} of {len(known)} classes have no label in this copy, {len(foreign)} of its "
            f"{len(found)} labels have no class, {twice} share one. These do not match:\n{table}\n"
            f"A name that means the same goes behind the class, after ' | ', in class_names/{name}.txt."
        )
    return matched


def _plain(name: str) -> str:
    """Reduce a name to its letters and digits; SUN397 calls a class `/c/church/outdoor`."""
    name = unicodedata.normalize("NFKD", name.casefold())
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^/[a-z]/", "", name))


def _with_class_labels(name: str, entry: HubSet, split: str, dataset: Dataset) -> Dataset:
    """Reduce to `image` and `label`, numbered as the task's classes are; drop the classes left out."""
    feature = dataset.features[entry.label]
    values = labels_of(dataset, entry.label)
    if isinstance(feature, ClassLabel):
        names, numbers = feature.names, values
    elif isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        names, numbers = np.unique(values.astype(str), return_inverse=True)
    elif entry.label_names is not None:
        names, numbers = list(entry.label_names), values
    else:
        raise ValueError(
            f"{name!r}: the labels of split {split!r} are {feature}, numbers without names, and their order is not to "
            "be guessed. Write the names by number into the entry's `label_names`, from the data set's own documents."
        )
    if numbers.dtype.kind == "f":  # some rows have none
        numbers = np.where(np.isnan(numbers), -1, numbers).astype(np.int64)
    outside = (numbers < 0) | (numbers >= len(names))
    if outside.any():
        row = int(outside.argmax())
        raise ValueError(
            f"{name!r}, split {split!r}, row {row}: label {numbers[row]} is none of {len(names)} classes."
        )
    matched = match_class_names(name, names, entry.without)
    labels = np.array([matched.get(word, -1) for word in names])[numbers]
    classes = ClassLabel(names=list(class_names(name)))
    # the labels stand beside the images, which stay where they are on disk
    dataset = dataset.select_columns(entry.image).rename_columns({entry.image: "image"})
    dataset = dataset.cast_column("image", RGBImage()).add_column("label", labels, feature=classes)
    kept = np.flatnonzero(labels >= 0)
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def _train_and_test(entry: HubSet, splits: dict[str, Dataset]) -> tuple[Dataset, Dataset]:
    def joined(names: str) -> Dataset:
        return concatenate_datasets([splits[name] for name in names.split("+")])

    if entry.split_seed is None:
        return joined(entry.train), joined(entry.test)
    images = joined(entry.train)
    count = int(0.8 * len(images))
    generator = torch.Generator().manual_seed(entry.split_seed)
    train, test = random_split(range(len(images)), [count, len(images) - count], generator=generator)
    return images.select(sorted(train.indices)), images.select(sorted(test.indices))


def _check_sizes(sizes: tuple[int, int], splits: dict[str, Dataset], name: str, entry: HubSet, place: str) -> None:
    if sizes != entry.sizes:
        found = ", ".join(f"{split}: {len(dataset)}" for split, dataset in splits.items())
        raise ValueError(
            f"{name!r} has {sizes[0]} images to train and {sizes[1]} to test on in {place} ({found}); the benchmark "
            f"has {entry.sizes[0]} and {entry.sizes[1]}. With other images numbers do not compare with published ones; "
            "`allow_size_mismatch` (`--allow_size_mismatch`) goes on all the same."
        )


def _place(entry: HubSet, name: str, data_dir: str | Path | None) -> str:
    if data_dir is not None:
        return repr(str(Path(data_dir) / name))
    return f"{entry.hub_id!r} at revision {entry.revision or 'main'!r}"


def _explained(error: Exception, name: str, entry: HubSet, place: str) -> Exception:
    """Say what went wrong in the user's terms."""
    chain = list(_causes(error))

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

    if met(GatedRepoError) or "gated dataset" in str(error):
        return PermissionError(
            f"{name!r}: {entry.hub_id!r} is gated. Accept its conditions at "
            f"https://huggingface.co/datasets/{entry.hub_id}, then `hf auth login`."
        )
    if met(DatasetNotFoundError):
        return FileNotFoundError(
            f"{name!r}: there is no {place} on the Hub, or it is private: it was renamed or removed, or wants "
            "`hf auth login`. Correct the entry in hub/table.py, or give a local copy by `data_dir`."
        )
    refused = [
        cause for cause in chain if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
    ]
    if refused:
        return PermissionError(f"{name!r}: the Hub refuses {place} ({refused[0]}). Try `hf auth login`.")
    if met(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, HTTPError):
        return ConnectionError(
            f"{name!r}: can't reach the Hub for {place}, or the connection broke off ({chain[-1]}). Connect, or unset "
            "HF_HUB_OFFLINE, and try again: what has arrived is kept. Or load it elsewhere with the prefetch command "
            "and bring the cache here, or a copy for `data_dir`."
        )
    if isinstance(error, FileNotFoundError):
        return error
    if any(getattr(cause, "errno", None) == errno.ENOSPC for cause in chain) or "disk space" in str(error):
        return OSError(
            errno.ENOSPC,
            f"{name!r}: no space left to keep {place}. Free some, or set HF_HOME to a larger disk, and try again",
        )
    return ValueError(
        f"{name!r}: {place} can't be read: {chain[-1]}. If a file was damaged or cut short on its way, load it anew by "
        "`force_download` (`--force_download` of the prefetch command)."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
