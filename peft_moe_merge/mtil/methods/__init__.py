"""Continual learning methods, one a file. To add one: write the file, and name its class here."""

from .base import Method, MethodSettings
from .moe_lora_merge import MoELoraMerge
from .zero_shot import ZeroShot

METHODS: dict[str, type[Method]] = {method.name: method for method in (ZeroShot, MoELoraMerge)}

__all__ = ["METHODS", "Method", "MethodSettings"]
