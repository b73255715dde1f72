"""How all pictures look: colours that the colour-blind can tell apart, and the few kinds of panels that they share.

Shapes: S seeds, X places along the horizontal axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .statistics import interval

COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#000000",
)  # Okabe and Ito 2008
BLUE, ORANGE, GREEN, PINK, SKY, RED = COLOURS[:6]
GREY = "#444444"
MARKERS = "os^Dv<>P"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "legend.edgecolor": "none",
    "text.parse_math": False,  # a `$` in a task's name is a `$`
}
WIDTH = 10.0  # inches


def look(position: int) -> dict[str, str]:
    """Colour and marker of a series by its position; after the last colour they come again, with another marker."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        "marker": MARKERS[(position + position // len(COLOURS)) % len(MARKERS)],
    }


def line(axes: Axes, x: Sequence[float], values_SX: Any, label: str, **style: Any) -> None:
    """Draw the mean over seeds as a line, with the 95 % interval as a band where there are several seeds."""
    mean_X, half_X = interval(values_SX)
    (drawn,) = axes.plot(x, mean_X, label=label, **style)
    if not np.isnan(half_X).all():
        axes.fill_between(x, mean_X - half_X, mean_X + half_X, color=drawn.get_color(), alpha=0.2, linewidth=0)


def heat_map(
    axes: Axes,
    values: np.ndarray,
    columns: list[str],
    rows: list[str],
    label: str,
    high: float | None = None,
    digits: int = 0,
) -> None:
    """Draw a matrix with its numbers, the first row on top."""
    high = high or max(1.0, values.max())
    image = axes.pcolormesh(values, cmap="viridis", vmin=0, vmax=high, edgecolor="white", linewidth=0.5)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.6 * high else "black"
        axes.text(column + 0.5, row + 0.5, f"{value:.{digits}f}", ha="center", va="center", color=colour)
    axes.set_xticks(np.arange(values.shape[1]) + 0.5, columns[: values.shape[1]], rotation=40, ha="right")
    axes.set_yticks(np.arange(values.shape[0]) + 0.5, rows[: values.shape[0]])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.figure.colorbar(image, ax=axes, label=label)


def panels(names: list[str], height: float) -> Iterator[tuple[Axes, str]]:
    """Make a figure with one panel a name, two in a row, on common axes; `height` of each in inches."""
    columns = 2
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes in grid[len(names) :]:
        axes.remove()
    return zip(grid, names, strict=False)
