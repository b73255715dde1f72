"""Continual learning methods, one a file of this folder, found by their `name`."""

from __future__ import annotations

import sys
from dataclasses import Field, fields, make_dataclass
from typing import Any

from peft_moe_merge.registry import discover

from ..settings import borrowed
from .base import Method, Routed, Settings

METHODS: dict[str, type[Method]] = discover(sys.modules[__name__], Method)
"""By name."""


def _all_settings() -> list[tuple[str, Any, Field]]:
    """Gather the settings of all methods, each once."""
    gathered: dict[str, tuple[str, Any, Field]] = {}
    for method in METHODS.values():
        for name, kind, own in borrowed(method.settings_class, [own.name for own in fields(method.settings_class)]):
            _, known_kind, known = gathered.setdefault(name, (name, kind, own))
            if (known_kind, known.default, known.metadata) != (kind, own.default, own.metadata):
                raise TypeError(f"Methods declare the setting {name!r} in two ways; {method.name!r} has the second.")
    return list(gathered.values())


class _Checked:
    def __post_init__(self):
        for settings_class in {method.settings_class for method in METHODS.values()}:
            settings_class.of(self)


MethodSettings = make_dataclass("MethodSettings", _all_settings(), bases=(_Checked,))
MethodSettings.__module__ = __name__
MethodSettings.__doc__ = """The settings of all methods, as the command line has them; each method takes what concerns it.

Raises:
    ValueError: a value that a method refuses.
"""

__all__ = ["METHODS", "Method", "MethodSettings", "Routed", "Settings"]
