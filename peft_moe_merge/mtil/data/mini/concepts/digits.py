"""Printed digits, by their words. The task itself shows handwritten ones (`load_task("digits", ...)`)."""

import functools

from ..canvas import Canvas, Concept
from .letters import _INKS

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def _digit(c: Canvas, value: int) -> None:
    c.glyph(str(value), c.pick(*_INKS))


CONCEPTS: dict[str, Concept] = {name: functools.partial(_digit, value=value) for value, name in enumerate(NAMES)}
