"""The static merges there are, each with its name and its source.

A merge is a function of the base model, the `TaskVectors` and its options. It returns the merged values of changed
parameters, in whatever precision it computes in. To add one, write it into a file of its own here, decorate it, and
import it in `__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter, signature

import torch

Function = Callable[..., dict[str, torch.Tensor]]


@dataclass(frozen=True)
class StaticMerge:
    """A way to merge fine-tuned models into one set of weights.

    Attributes:
        name: by which `merge_static` knows it.
        source: the publication.
        merge: the function.
    """

    name: str
    source: str
    merge: Function

    @property
    def options(self) -> dict[str, Parameter]:
        """What the merge takes besides the base model and the task vectors."""
        own = list(signature(self.merge).parameters.items())[2:]
        return {name: option for name, option in own if option.kind is not Parameter.VAR_KEYWORD}

    @property
    def takes_others(self) -> bool:
        """It knows names of earlier releases too, and says itself which ones it does not."""
        return any(p.kind is Parameter.VAR_KEYWORD for p in signature(self.merge).parameters.values())

    def __call__(self, *args, **options) -> dict[str, torch.Tensor]:
        return self.merge(*args, **options)


STATIC_MERGES: dict[str, StaticMerge] = {}


def static_merge(name: str, source: str) -> Callable[[Function], Function]:
    """Register a merge. It stays a function, which other merges may call."""

    def register(merge: Function) -> Function:
        STATIC_MERGES[name] = StaticMerge(name, source, merge)
        return merge

    return register
