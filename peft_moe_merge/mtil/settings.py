"""How a setting is declared: once, with the explanation that the command line shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_args, get_type_hints

RENAMED_OPTIONS = {"--merge_router_columns": "--merge_routing"}
"""Options of the command line that were called otherwise in earlier releases."""


def setting(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A field with the explanation that a command line shows, and the values that it offers.

    Where the choices are fixed, a `Literal` type says so too; `choices` are for lists and for what registries hold.
    """
    metadata: dict[str, Any] = {"help": help} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def borrowed(config: type, names: Iterable[str]) -> list[tuple[str, Any, Field]]:
    """Take fields of another dataclass, with their types, defaults and explanations, for `dataclasses.make_dataclass`.

    Args:
        config: the dataclass that owns them.
        names: of its fields.

    Raises:
        AttributeError: `config` has no such field.
    """
    known, types = {own.name: own for own in fields(config)}, get_type_hints(config)
    if unknown := [name for name in names if name not in known]:
        raise AttributeError(f"{config.__name__} has no field {', '.join(unknown)}; there are {list(known)}.")
    return [
        (
            name,
            types[name],
            field(default=known[name].default, metadata=known[name].metadata)
            if known[name].default is not MISSING
            else field(default_factory=known[name].default_factory, metadata=known[name].metadata),
        )
        for name in names
    ]


def check_choices(settings: Any, name: str, known: Iterable[str] | None = None) -> None:
    """Raise a ValueError unless a setting, or each item of one that is a list, is among the known values.

    By default these are the values of the setting's `Literal` type.
    """
    value = getattr(settings, name)
    known = list(get_args(get_type_hints(type(settings))[name]) if known is None else known)
    unknown = [one for one in (value if isinstance(value, list) else [value]) if one not in known]
    if unknown:
        raise ValueError(f"Unknown {name} {unknown}; there are {known}.")


def check_positive(settings: Any, *names: str) -> None:
    """Raise a ValueError unless these settings are greater than zero."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"`{name}` must be positive, got {getattr(settings, name)}.")


def check_at_least(settings: Any, least: float, *names: str) -> None:
    """Raise a ValueError unless these settings, where they are not None, reach a value."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def renamed_options(arguments: Sequence[str]) -> list[str]:
    """Translate options of earlier releases on a command line, with a warning for each."""
    translated = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option in RENAMED_OPTIONS:
            warnings.warn(f"`{option}` is now `{RENAMED_OPTIONS[option]}`.", FutureWarning, stacklevel=2)
            argument = f"{RENAMED_OPTIONS[option]}{equals}{value}"
        translated.append(argument)
    return translated
