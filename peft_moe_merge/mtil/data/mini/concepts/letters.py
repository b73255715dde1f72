"""Capital letters whose forms stay apart at a low resolution."""

import functools

from ..canvas import Canvas, Concept

_INKS = ("black", "dark blue", "red", "dark green", "purple", "white", "yellow", "brown", "blue")


def _letter(c: Canvas, character: str) -> None:
    c.glyph(character, c.pick(*_INKS))


CONCEPTS: dict[str, Concept] = {name: functools.partial(_letter, character=name) for name in "ABCDEFGHJKLMPRSTWX"}
