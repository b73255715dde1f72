"""Strict reading of adapter files, at the places where they are read and no tuner has a say.

`PeftConfigMixin.from_json_file` is where PEFT's every way to an adapter reads the JSON file, and `PeftModel.load_adapter`
is where it reads the weights, also when a `config` is handed over and the file is not looked at. transformers' models
have a `load_adapter` of their own. These three are wrapped here and nowhere else. Adapters of other methods pass through
as they were, except that a JSON file that can't be read is named.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import PeftConfig, PeftModel
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers.integrations.peft import PeftAdapterMixin

from peft_moe_merge.files import CHECKSUMS, check_seal, check_weights_sum, read_json

from .adapter_config import UNGUARDED, AdapterConfig, refuse_pickle


def guard_peft() -> None:
    """Wrap the doors once, or anew when the package is imported a second time."""
    read = PeftConfigMixin.__dict__["from_json_file"].__func__
    PeftConfigMixin.from_json_file = classmethod(_guarded(read, _from_json_file))
    PeftModel.load_adapter = _guarded(PeftModel.load_adapter, _load_adapter)
    PeftAdapterMixin.load_adapter = _guarded(PeftAdapterMixin.load_adapter, _load_adapter_into_plain_model)


def _guarded(current: Callable, guard: Callable) -> Callable:
    original = getattr(current, "unguarded", current)

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        return guard(original, *args, **kwargs)

    function.unguarded = original
    return function


def _from_json_file(original: Callable, cls: type[PeftConfig], path_json_file: str, **kwargs: Any) -> dict[str, Any]:
    try:
        described = original(cls, path_json_file, **kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path_json_file)!r} is damaged: {error}. Save or download it anew.") from error
    if not isinstance(described, dict):
        raise ValueError(f"{str(path_json_file)!r} is damaged: it holds no JSON object. Save or download it anew.")
    kind = described.get("peft_type")
    if "peft_type" in described and not (isinstance(kind, str) and kind in PEFT_TYPE_TO_CONFIG_MAPPING):
        raise ValueError(
            f"{str(path_json_file)!r} is of an unknown kind of adapter, peft_type={kind!r}. It is damaged, or made by a "
            "package that has to be imported first."
        )
    if _is_ours(kind):
        try:
            PEFT_TYPE_TO_CONFIG_MAPPING[kind](**described)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            kind_of_error = TypeError if isinstance(error, TypeError) else ValueError
            raise kind_of_error(f"{str(path_json_file)!r}: {error}") from error
    if _is_ours(kind) or CHECKSUMS in described:  # last: that a newer release wrote the file says more
        check_seal(read_json(path_json_file), Path(path_json_file), UNGUARDED)
    return described


def _is_ours(kind: Any) -> bool:
    config_cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    return config_cls is not None and issubclass(config_cls, AdapterConfig)


def _load_adapter(
    original: Callable, model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    hub, _ = model._split_kwargs(kwargs)
    known = model.peft_config.get(adapter_name)
    ours = isinstance(known, AdapterConfig) or (known is None and _is_ours(PeftConfig._get_peft_type(model_id, **hub)))
    if not ours:
        return original(model, model_id, adapter_name, *args, **kwargs)
    weights = check_files(model_id, **hub)
    try:
        return original(model, model_id, adapter_name, *args, **kwargs)
    except (SafetensorError, KeyError, ValueError) as error:
        if known is None and adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        reason = f"it lacks the tensor {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"Could not load {str(weights)!r}: {reason}") from error


def _load_adapter_into_plain_model(
    original: Callable, model: Any, peft_model_id: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if peft_model_id is not None:
        hub, _ = PeftConfig._split_kwargs(kwargs.get("adapter_kwargs") or {})[:2]
        described = find(peft_model_id, CONFIG_NAME, **hub)
        if described is not None and _is_ours(PeftConfig.from_json_file(described).get("peft_type")):
            check_files(peft_model_id, **hub)
    return original(model, peft_model_id, *args, **kwargs)


def check_files(adapter: Any, **hub: Any) -> Path:
    """Check an adapter's files as far as that goes without a model, and return where its weights are.

    Raises:
        ValueError: there are no weights, or only a pickle file; a file is not what was written.
    """
    refuse_pickle(adapter, **hub)
    weights = find(adapter, SAFETENSORS_WEIGHTS_NAME, **hub)
    if weights is None:
        raise ValueError(f"There is no {SAFETENSORS_WEIGHTS_NAME!r} in {str(adapter)!r}: no adapter, or half of one.")
    described = find(adapter, CONFIG_NAME, **hub)
    if described is not None:
        check_weights_sum(PeftConfig.from_json_file(described), described, weights)
    return weights


def find(adapter: Any, name: str, subfolder: str | None = None, **download: Any) -> Path | None:
    """Return where a file of an adapter is, downloading it if the adapter is on the Hub; `None` if it has no such file."""
    path = Path(adapter, subfolder or "", name)
    if path.is_file():
        return path
    if Path(adapter).is_dir():
        return None
    try:
        return Path(hf_hub_download(str(adapter), name, subfolder=subfolder, **download))
    except (EntryNotFoundError, HFValidationError):
        return None
