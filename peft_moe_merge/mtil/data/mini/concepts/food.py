"""Dishes, fruit and vegetables."""

import numpy as np

from ..canvas import Canvas, Concept


def _apple(c: Canvas) -> None:
    paint = c.pick("red", "light green")
    c.path([(0, -0.5), (0.12, -0.95)], "brown", 0.1)
    c.disc(0.32, -0.75, 0.25, "green", 0.12, -20)
    c.disc(-0.28, 0.1, 0.52, paint, 0.68)
    c.disc(0.28, 0.1, 0.52, paint, 0.68)


def _banana(c: Canvas) -> None:
    outer, inner = np.linspace(0.05, 0.95, 12) * np.pi, np.linspace(0.9, 0.1, 12) * np.pi
    points = [(np.cos(t), -0.35 + np.sin(t)) for t in outer] + [
        (0.9 * np.cos(t), -0.4 + 0.5 * np.sin(t)) for t in inner
    ]
    c.polygon(points, "yellow")
    c.disc(-0.95, -0.2, 0.1, "brown")


def _cake(c: Canvas) -> None:
    base = c.pick("brown", "cream")
    c.box(-0.8, 0.1, 0.8, 0.8, base)
    c.box(-0.8, -0.15, 0.8, 0.2, "pink")
    c.box(-0.8, 0.42, 0.8, 0.5, "white")
    for x in (-0.4, 0.0, 0.4):
        c.box(x - 0.06, -0.65, x + 0.06, -0.15, "light blue")
        c.disc(x, -0.78, 0.09, "orange", 0.14)


def _carrot(c: Canvas) -> None:
    for x in (-0.35, 0.0, 0.35):
        c.path([(0, -0.4), (x, -0.98)], "green", 0.14)
    c.polygon([(-0.35, -0.45), (0.35, -0.45), (0.05, 1.0), (-0.05, 1.0)], "orange")
    c.path([(-0.2, -0.1), (0.05, -0.1)], "brown", 0.05)
    c.path([(0.0, 0.3), (0.15, 0.3)], "brown", 0.05)


def _cheese(c: Canvas) -> None:
    c.polygon([(-0.95, 0.1), (0.5, -0.6), (0.95, 0.1)], "cream")
    c.box(-0.95, 0.1, 0.95, 0.7, "yellow")
    for _ in range(4):
        c.disc(c.uniform(-0.75, 0.75), c.uniform(0.25, 0.55), 0.11, "orange")


def _cherries(c: Canvas) -> None:
    for x in (-0.45, 0.45):
        c.path([(x, 0.3), (0.1, -0.9)], "green", 0.07)
        c.disc(x, 0.5, 0.4, "red")
    c.disc(0.38, -0.8, 0.32, "green", 0.14, 15)


def _donut(c: Canvas) -> None:
    c.disc(0, 0, 0.92, "tan")
    c.disc(0, 0, 0.76, c.pick("pink", "brown", "white"))
    for angle in c.rng.uniform(0, 2 * np.pi, 10):
        c.disc(
            0.55 * np.cos(angle),
            0.55 * np.sin(angle),
            0.08,
            c.pick("blue", "yellow", "green", "red"),
            0.04,
            90 * angle,
        )
    c.disc(0, 0, 0.3, "dark gray")


def _egg(c: Canvas) -> None:
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radii = c.rng.uniform(0.75, 1.0, 12)
    c.polygon(list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), "white")
    c.disc(c.uniform(-0.2, 0.2), c.uniform(-0.2, 0.2), 0.38, "orange" if c.rng.random() < 0.5 else "yellow")


def _grapes(c: Canvas) -> None:
    paint = c.pick("purple", "light green")
    c.path([(0, -0.6), (0.05, -1.0)], "brown", 0.1)
    for row, count in enumerate((4, 3, 2, 1)):
        for k in range(count):
            c.disc(0.42 * (k - (count - 1) / 2), -0.5 + 0.4 * row, 0.24, paint)


def _hamburger(c: Canvas) -> None:
    c.box(-0.85, 0.45, 0.85, 0.8, "tan")
    c.box(-0.92, 0.15, 0.92, 0.45, "brown")
    c.box(-0.98, -0.02, 0.98, 0.15, "green")
    c.box(-0.9, -0.15, 0.9, 0.0, "red")
    angles = np.linspace(np.pi, 2 * np.pi, 14)
    c.polygon([(0.88 * np.cos(t), -0.15 + 0.7 * np.sin(t)) for t in angles], "tan")
    for x, y in ((-0.4, -0.45), (0.0, -0.6), (0.4, -0.45)):
        c.disc(x, y, 0.06, "cream")


def _ice_cream(c: Canvas) -> None:
    c.polygon([(-0.45, 0.0), (0.45, 0.0), (0, 1.0)], "tan")
    for x, y in ((-0.25, -0.15), (0.25, -0.15), (0.0, -0.6)):
        c.disc(x, y, 0.38, c.pick("pink", "white", "brown", "light green"))


def _mushroom(c: Canvas) -> None:
    c.polygon([(-0.22, 0.0), (0.22, 0.0), (0.3, 0.9), (-0.3, 0.9)], "cream")
    angles = np.linspace(np.pi, 2 * np.pi, 14)
    c.polygon([(0.95 * np.cos(t), 0.1 + 0.95 * np.sin(t)) for t in angles], c.pick("brown", "red"))
    for x, y in ((-0.5, -0.2), (0.05, -0.5), (0.5, -0.15)):
        c.disc(x, y, 0.12, "white")


def _pizza(c: Canvas) -> None:
    c.disc(0, 0, 0.95, "tan")
    c.disc(0, 0, 0.8, "yellow")
    for angle in np.linspace(0, 2 * np.pi, 5, endpoint=False) + c.uniform(0, 1):
        c.disc(0.5 * np.cos(angle), 0.5 * np.sin(angle), 0.19, "red")
        c.disc(0.3 * np.cos(angle + 0.6), 0.3 * np.sin(angle + 0.6), 0.08, "dark green")


def _watermelon(c: Canvas) -> None:
    angles = np.linspace(0, np.pi, 16)
    for radius, colour in ((1.0, "dark green"), (0.86, "white"), (0.76, "red")):
        c.polygon([(radius * np.cos(t), -0.45 + radius * np.sin(t)) for t in angles], colour)
    for x, y in ((-0.4, -0.2), (0.0, 0.0), (0.4, -0.2), (-0.15, -0.3), (0.2, -0.25)):
        c.disc(x, y, 0.06, "black", 0.09)


CONCEPTS: dict[str, Concept] = {
    "apple": _apple,
    "banana": _banana,
    "cake": _cake,
    "carrot": _carrot,
    "cheese": _cheese,
    "cherries": _cherries,
    "donut": _donut,
    "fried egg": _egg,
    "grapes": _grapes,
    "hamburger": _hamburger,
    "ice cream": _ice_cream,
    "mushroom": _mushroom,
    "pizza": _pizza,
    "watermelon": _watermelon,
}
