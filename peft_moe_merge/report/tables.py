"""Tables as rows of text, the first of which is the header: for a terminal, in Markdown and on a page."""

from __future__ import annotations

from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .statistics import Estimate

Rows = list[list[str]]
WIDTH = 200  # of a terminal that is none, such as a file


def number(value: float | None, digits: int = 1) -> str:
    """Write a number, or "-" if there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def spread(known: Estimate, digits: int = 1) -> str:
    """Write a mean with half of its interval, if there is one."""
    half = "" if known.half is None else f" ±{known.half:.{digits}f}"
    return number(known.mean, digits) + half


def difference(known: Estimate) -> str:
    """Write a difference with its interval, if there is one."""
    if known.mean is None:
        return "-"
    interval = "" if known.half is None else f" [{known.low:+.2f},{known.high:+.2f}]"
    return f"{known.mean:+.2f}{interval}"


def markdown(rows: Rows) -> str:
    """Write a table in Markdown."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines.insert(1, " | ".join(["---"] + ["---:"] * (len(rows[0]) - 1)))
    return "\n".join(f"| {line} |" for line in lines)


def terminal() -> Console:
    """Return a console that leaves tables their width where the output is a file."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH))


def print_table(console: Console, rows: Rows, title: str, caption: str = "", sections: Collection[int] = ()) -> None:
    """Print a table.

    Args:
        console: where to.
        rows: the table.
        title: above it.
        caption: below it.
        sections: the numbers of rows (the first below the header is 1) that a line follows.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for position, heading in enumerate(rows[0]):
        table.add_column(Text(heading), justify="right" if position else "left", overflow="fold", no_wrap=not position)
    for count, row in enumerate(rows[1:], start=1):
        table.add_row(*map(Text, row), end_section=count in sections)
    console.print(Text(title, style="bold"))
    console.print(table)
    if caption:
        console.print(Text(caption, style="italic"))
    console.print()
