"""Flowers by the number, form and colour of their petals."""

import functools

import numpy as np

from ..canvas import Canvas, Concept


def _petals(
    c: Canvas,
    count: int,
    colour: str,
    centre: str,
    petal: tuple[float, float] = (0.55, 0.2),
    eye: float = 0.28,
    layers: int = 1,
) -> None:
    """Seen from above: rings of petals around an eye; `petal` is the length and the width of one."""
    length, width = petal
    turn = c.uniform(0, 360)
    for layer in range(layers):
        size = 1 - 0.28 * layer
        for k in range(count):
            angle = np.deg2rad(turn + 360 * (k + 0.5 * layer) / count)
            reach = (1 - length) * size * c.uniform(0.95, 1.05)
            c.disc(
                reach * np.cos(angle), reach * np.sin(angle), length * size, colour, width * size, np.rad2deg(angle)
            )
    c.disc(0, 0, eye, centre)


def _rose(c: Canvas) -> None:
    for radius, colour in ((0.95, "red"), (0.7, "pink"), (0.5, "red"), (0.28, "pink"), (0.14, "red")):
        x, y = c.uniform(-0.08, 0.08), c.uniform(-0.08, 0.08)
        c.disc(x, y, radius, colour, radius * c.uniform(0.85, 1.0), c.uniform(0, 180))


def _tulip(c: Canvas) -> None:
    c.path([(0, 0), (c.uniform(-0.1, 0.1), 1)], "green", 0.1)
    c.polygon([(0, 0.95), (-0.6, 0.2), (-0.2, 0.5)], "green")
    colour = c.pick("red", "yellow", "pink")
    c.polygon(
        [(-0.5, -0.85), (-0.2, -0.5), (0, -0.95), (0.2, -0.5), (0.5, -0.85), (0.45, -0.1), (0, 0.15), (-0.45, -0.1)],
        colour,
    )


def _bluebell(c: Canvas) -> None:
    c.path([(-0.2, 1), (-0.1, -0.4), (0.2, -0.9), (0.6, -0.8)], "green", 0.08)
    for x, y in ((0.6, -0.75), (0.15, -0.45), (-0.45, -0.1)):
        c.polygon([(x - 0.12, y), (x + 0.12, y), (x + 0.28, y + 0.6), (x, y + 0.45), (x - 0.28, y + 0.6)], "blue")


def _lavender(c: Canvas) -> None:
    for x in (-0.5, 0.0, 0.5):
        c.path([(0.3 * x, 1), (x, -0.2)], "green", 0.07)
        for k in range(5):
            c.disc(x + 0.05 * (-1) ** k, -0.9 + 0.22 * k, 0.13, "purple")


def _dandelion(c: Canvas) -> None:
    c.path([(0, 0), (0.1, 1)], "light green", 0.08)
    for angle in np.linspace(0, 2 * np.pi, 16, endpoint=False) + c.uniform(0, 1):
        c.path([(0, -0.25), (0.65 * np.cos(angle), -0.25 + 0.65 * np.sin(angle))], "white", 0.06)
    c.disc(0, -0.25, 0.12, "brown")


CONCEPTS: dict[str, Concept] = {
    "bluebell": _bluebell,
    "buttercup": functools.partial(_petals, count=5, colour="yellow", centre="orange", petal=(0.45, 0.38), eye=0.2),
    "cornflower": functools.partial(_petals, count=9, colour="blue", centre="dark blue", petal=(0.45, 0.16), eye=0.25),
    "daisy": functools.partial(_petals, count=12, colour="white", centre="yellow", petal=(0.55, 0.13)),
    "dandelion": _dandelion,
    "lavender": _lavender,
    "lily": functools.partial(_petals, count=6, colour="white", centre="light green", petal=(0.52, 0.18), eye=0.12),
    "lotus": functools.partial(
        _petals, count=8, colour="pink", centre="yellow", petal=(0.55, 0.22), eye=0.2, layers=2
    ),
    "poppy": functools.partial(_petals, count=4, colour="red", centre="black", petal=(0.5, 0.46), eye=0.22),
    "rose": _rose,
    "sunflower": functools.partial(_petals, count=14, colour="yellow", centre="brown", petal=(0.4, 0.12), eye=0.48),
    "tulip": _tulip,
    "violet": functools.partial(_petals, count=5, colour="purple", centre="yellow", petal=(0.45, 0.36), eye=0.14),
}
