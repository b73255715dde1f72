"""How the methods of this package describe their adapters in a file, where PEFT's own way is too trusting."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from peft_moe_merge.files import read_json, sealed, whole

UNGUARDED = ("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version")
"""Fields without a checksum: users edit where the base model is, and no output of the adapter depends on the others."""


@dataclass
class AdapterConfig(PeftConfig):
    """A `PeftConfig` whose adapters are never read from pickle files, and whose file appears whole or not at all.

    PEFT writes the weights first. The file of this configuration, written after them, holds the checksum of the
    weights and one of its own fields but the `UNGUARDED` ones. `files.py` beside this has PEFT check them.

    Args:
        checksums: those of the adapter's files; set by the library, and `None` outside of files.

    Raises:
        TypeError: a field that this release does not have. PEFT drops those with a warning, but one may change what the
            weights mean.
    """

    checksums: dict[str, str] | None = field(default=None, metadata={"help": "Checksums of the adapter's files."})

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        if unknown := sorted(set(kwargs) - set(known)):
            raise TypeError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}. If this comes from an adapter file, a "
                f"newer release of peft_moe_merge wrote it: `pip install -U peft-moe-merge`. Fields: {', '.join(known)}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.checksums = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """Read a config, from a folder or the Hub, as `PeftConfig` does.

        Raises:
            ValueError: there is no config; it is damaged; its values are refused; or the weights beside it are a pickle
                file.
            TypeError: it has a field that this release does not have, or a value of a wrong type.
        """
        refuse_pickle(pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0])
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the config as `PeftConfig` does, with checksums; a full disk leaves the file that was there before."""
        os.makedirs(save_directory, exist_ok=True)
        file = Path(save_directory, CONFIG_NAME)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".partial-") as partial:
            super().save_pretrained(partial, **kwargs)
            described = read_json(Path(partial, CONFIG_NAME))
        described = sealed(described, file, file.with_name(SAFETENSORS_WEIGHTS_NAME), UNGUARDED)
        with whole(file) as partial:
            partial.write_text(json.dumps(described, indent=2, sort_keys=True))


def refuse_pickle(adapter: str | os.PathLike, subfolder: str | None = None, **download: Any) -> None:
    """Refuse an adapter that holds pickled weights and no safetensors, which PEFT would fall back to.

    Costs one request where the adapter comes from the Hub.

    Args:
        adapter: folder, or name on the Hub.
        subfolder: where in it the adapter is.
        download: `revision`, `token` and others of `hf_hub_download`.

    Raises:
        ValueError: there is only a pickled file.
    """
    adapter, revision = str(adapter), download.get("revision")
    safe, pickled = ("/".join(filter(None, (subfolder, name))) for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if Path(adapter).is_dir():
        there = [file for file in (safe, pickled) if Path(adapter, file).is_file()]
    elif is_offline_mode() or download.get("local_files_only"):
        cache = {"revision": revision, "cache_dir": download.get("cache_dir")}
        there = [file for file in (safe, pickled) if isinstance(try_to_load_from_cache(adapter, file, **cache), str)]
    else:
        found = HfApi(token=download.get("token")).get_paths_info(adapter, [safe, pickled], revision=revision)
        there = [file.path for file in found]
    if there == [pickled]:
        raise ValueError(
            f"The adapter {adapter!r} has its weights in {pickled!r}, a pickle file, which may run any code when it is "
            f"read. Only {safe!r} is loaded: ask the author to save the adapter by `save_pretrained`, which writes that "
            "by default."
        )
