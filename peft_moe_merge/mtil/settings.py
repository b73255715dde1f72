"""How a setting is declared: once, with the explanation that the command line shows."""

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A field with the explanation that a command line shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
