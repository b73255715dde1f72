"""Things of a colour: the shape is random, the colour is the class."""

import functools

import numpy as np

from ..canvas import Canvas, Concept

_NAMES = ("black", "blue", "brown", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow")


def _blob(c: Canvas, colour: str) -> None:
    corners = c.rng.integers(4, 11)
    angles = np.sort(c.rng.uniform(0, 2 * np.pi, corners)) if corners < 7 else 2 * np.pi * np.arange(corners) / corners
    radii = c.rng.uniform(0.6, 1.05, corners)
    c.polygon(list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), colour)


CONCEPTS: dict[str, Concept] = {name: functools.partial(_blob, colour=name) for name in _NAMES}
