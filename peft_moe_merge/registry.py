"""Finds what there is by name, so that adding one is adding a file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import TypeVar

Kind = TypeVar("Kind")


def discover(package: ModuleType, kind: type[Kind], attribute: str = "name") -> dict[str, type[Kind]]:
    """Import all modules of a package, and return the classes of a kind that are defined there, by their names.

    Args:
        package: with one class a module, or several.
        kind: their common base. Classes that do not set `attribute` themselves, or have abstract methods, are left out.
        attribute: that names a class.

    Raises:
        ValueError: two classes have the same name.
    """
    found: dict[str, type[Kind]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for one in list(vars(module).values()):
            if not inspect.isclass(one) or not issubclass(one, kind) or one.__module__ != module.__name__:
                continue
            name = vars(one).get(attribute)
            if not isinstance(name, str) or inspect.isabstract(one):
                continue
            if name in found:
                raise ValueError(
                    f"{found[name].__module__} and {module.__name__} both have a {kind.__name__} {name!r}."
                )
            found[name] = one
    return found
