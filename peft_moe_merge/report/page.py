"""A report as one page that needs nothing else: no network, no other file, no script.

What could be a script's is the browser's own here: contents and links, parts that fold, cells that tell more when pointed
at. A plotting library would add megabytes to every page, and nothing of it would be left where scripts are off, as in a
mail or on a page of the Hub.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from peft_moe_merge.files import whole

from .tables import Rows

DPI = 144
SCREEN_DPI = 96  # what a browser takes an inch for
GAIN, LOSS = (92, 158, 214), (240, 146, 88)  # red, green, blue; dark letters can be read on both


@dataclass(frozen=True)
class TextTable:
    """A table on a page.

    Attributes:
        rows: the first one is the header.
        note: what is said below it.
        title: what is said above it.
        text: whether its cells are prose, to be set flush left and broken, rather than numbers.
        marks: cells that are set in a colour: their text -> `"good"`, `"fair"` or `"bad"`.
    """

    rows: Rows
    note: str = ""
    title: str = ""
    text: bool = False
    marks: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Picture:
    """A picture on a page: a PNG, its caption, and the name it has there."""

    name: str
    png: bytes
    caption: str

    @property
    def data(self) -> str:
        """The PNG as an address that holds it."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def width(self) -> int:
        """In a browser's pixels, so that letters are of one size in all pictures."""
        return int.from_bytes(self.png[16:20], "big") * SCREEN_DPI // DPI


@dataclass(frozen=True)
class Words:
    """Sentences that readers should see first, one a line."""

    sentences: list[str]


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map.

    Attributes:
        text: what stands in it.
        hover: what is said where a pointer rests on it.
        weight: -1 ... 1, its colour; None for no colour.
    """

    text: str
    hover: str = ""
    weight: float | None = None

    @property
    def colour(self) -> str | None:
        """As CSS writes it: from orange through white to blue, which colour-blind readers can tell apart."""
        if self.weight is None:
            return None
        strength = min(abs(self.weight), 1.0)
        full = GAIN if self.weight > 0 else LOSS
        return "#" + "".join(f"{round(255 - strength * (255 - part)):02x}" for part in full)


@dataclass(frozen=True)
class HeatMap:
    """A table of coloured numbers.

    Attributes:
        heading: of the columns; the first is that of the rows' names.
        lines: the name of each row and its cells.
        title: what is said above it.
    """

    heading: list[str]
    lines: list[tuple[str, list[Cell]]]
    title: str = ""


@dataclass(frozen=True)
class Fold:
    """Parts behind a line that opens them.

    Attributes:
        title: the line.
        parts: what it opens.
        open: whether they show from the beginning.
    """

    title: str
    parts: list[Part]
    open: bool = False


Part = TextTable | Picture | Words | HeatMap | Fold | str
"""What stands on a page; text is a note."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    parts: list[Part]

    @property
    def anchor(self) -> str:
        """What links to it say."""
        return re.sub(r"[^a-z0-9]+", "-", self.heading.lower()).strip("-") or "section"


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """Render a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return Picture(name, buffer.getvalue(), caption)


def page(title: str, introduction: str, sections: list[Section]) -> str:
    """Compose a page as HTML; sections without parts are left out. All text is escaped."""
    # the one template that all reports share
    environment = Environment(
        loader=PackageLoader("peft_moe_merge", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    shown = [section for section in sections if section.parts]
    return template.render(title=title, introduction=introduction, sections=shown)


def write_report_files(
    folder: Path, name: str, html: str, pictures: list[Picture], pictures_in: str = "."
) -> list[Path]:
    """Write a page and its pictures. Each file appears complete or not at all, the page last.

    Args:
        folder: where to; made if it is not there.
        name: of the page.
        html: the page.
        pictures: to be written as `<name>.png` too.
        pictures_in: the folder of the pictures in `folder`.

    Returns:
        The files written, the page last.
    """
    (folder / pictures_in).mkdir(parents=True, exist_ok=True)
    contents = {folder / pictures_in / f"{one.name}.png": one.png for one in pictures}
    contents[folder / name] = html.encode()
    for path, content in contents.items():
        write_file(path, content)
    return list(contents)


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    with whole(path) as partial:
        partial.write_bytes(content)
