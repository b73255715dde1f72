"""How the methods of this package read and write their adapter files, where PEFT's own way is too trusting."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


class AdapterConfig(PeftConfig):
    """A `PeftConfig` whose adapters are never read from pickle files, and whose file appears whole or not at all.

    PEFT reads the config before the weights, so what must not be loaded is refused here.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> AdapterConfig:
        """Read a config, from a folder or the Hub, as `PeftConfig` does.

        Raises:
            ValueError: there is no config; its values are refused; or the weights beside it are a pickle file.
        """
        refuse_pickle(pretrained_model_name_or_path, subfolder, **cls._split_kwargs(kwargs)[0])
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the config as `PeftConfig` does, but a full disk leaves the file that was there before."""
        os.makedirs(save_directory, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_directory, prefix=".partial-") as partial:
            super().save_pretrained(partial, **kwargs)
            os.replace(Path(partial, CONFIG_NAME), Path(save_directory, CONFIG_NAME))


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
