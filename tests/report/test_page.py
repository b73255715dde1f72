"""The one page template and the tables: what is text stays text, in HTML, Markdown and on a terminal."""

import io
from html.parser import HTMLParser

from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from peft_moe_merge.report.page import (
    Cell,
    Fold,
    HeatMap,
    Section,
    TextTable,
    Words,
    page,
    picture,
    write_report_files,
)
from peft_moe_merge.report.statistics import Estimate
from peft_moe_merge.report.tables import difference, markdown, print_table, spread

NASTY = """<script>alert("1")</script> & 'x' | {{ 7 * 7 }} [bold]"""
ROWS = [["method", "Last"], [NASTY, "1.0"], ["plain", "holds"]]


class Reader(HTMLParser):
    """Collect elements, the text of cells, and check that every element is closed in its place."""

    VOID = ("meta", "link", "img")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.elements, self.cells = [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def drawn():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    return picture("line", figure, f"caption {NASTY}")


def test_the_page_shows_text_as_it_is():
    table = TextTable(ROWS, note=NASTY, title=NASTY, marks={"holds": "good"})
    html = page(NASTY, NASTY, [Section(NASTY, [table, drawn(), NASTY]), Section("nothing", [])])
    read = Reader(html)
    assert read.cells == ["method", "Last", NASTY, "1.0", "plain", "holds"]
    assert (
        not [tag for tag, _ in read.elements if tag == "script"] and "nothing" not in html and "49" not in read.cells
    )
    assert [attrs.get("class") for tag, attrs in read.elements if tag == "td"] == [None, None, None, "good"]
    (image,) = [attrs for tag, attrs in read.elements if tag == "img"]
    assert image["alt"] == f"caption {NASTY}" and image["src"].startswith("data:image/png;base64,")
    assert image["width"] == "192", "two inches"


def test_words_heat_maps_and_what_folds():
    heat = HeatMap(
        ["after", NASTY], [(NASTY, [Cell("+1", NASTY, 1.0)]), ("b", [Cell("-9", weight=-3.0)]), ("c", [Cell("")])]
    )
    html = page("", "", [Section("One & two", [Words([NASTY]), Fold(NASTY, [Fold("inner", [heat])], open=True)])])
    read = Reader(html)
    assert read.cells == ["after", NASTY, NASTY, "+1", "b", "-9", "c", ""]
    cells = [attrs for tag, attrs in read.elements if tag == "td"]
    assert cells[0]["title"] == NASTY and cells[2] == {}
    red, green, blue = (int(cells[0]["style"][-6:][at : at + 2], 16) for at in (0, 2, 4))
    assert blue > green > red, "gains are blue"
    red, green, blue = (int(cells[1]["style"][-6:][at : at + 2], 16) for at in (0, 2, 4))
    assert red > green > blue, "losses are orange, and no colour is beyond the full one"
    assert Cell("", weight=-1.0).colour == Cell("", weight=-3.0).colour != Cell("", weight=-0.5).colour
    assert Cell("", weight=0.0).colour == "#ffffff"
    assert [attrs for tag, attrs in read.elements if tag == "details"] == [{"open": None}, {}]
    assert html.count("&lt;script&gt;") >= 4 and "<script" not in html


def test_contents_lead_to_every_section():
    sections = [Section(name, ["text"]) for name in ("One & two", "Three", "Four")]
    read = Reader(page("", "", [*sections, Section("nothing", [])]))
    links = [attrs["href"] for tag, attrs in read.elements if tag == "a"]
    assert links == ["#one-two", "#three", "#four"]
    assert [f"#{attrs['id']}" for tag, attrs in read.elements if tag == "h2"] == links
    assert "<nav" not in page("", "", sections[:2]), "what fits on a screen needs none"


def test_files_are_written_with_the_page_last(tmp_path):
    one = drawn()
    files = write_report_files(tmp_path / "new", "index.html", page("title", "", []), [one], pictures_in="figures")
    assert [file.relative_to(tmp_path / "new").as_posix() for file in files] == ["figures/line.png", "index.html"]
    assert Image.open(io.BytesIO(files[0].read_bytes())).size == (288, 144)
    assert sorted(path.name for path in (tmp_path / "new").rglob("*.*")) == ["index.html", "line.png"]


def test_markdown_and_terminal_have_the_same_rows():
    lines = markdown(ROWS).splitlines()
    assert lines[1] == "| --- | ---: |" and lines[3] == "| plain | holds |"
    assert lines[2].count("|") - lines[2].count("\\|") == 3, "a bar in a cell does not part it"
    console = Console(record=True, width=200)
    print_table(console, ROWS, NASTY, NASTY)
    assert console.export_text().count(NASTY) == 3


def test_numbers_as_text():
    assert spread(Estimate(2.0, 1.25, 3)) == "2.0 ±1.2" and spread(Estimate(2.0, None, 1), 2) == "2.00"
    assert spread(Estimate(None, None, 0)) == difference(Estimate(None, None, 0)) == "-"
    assert (
        difference(Estimate(-0.5, 1.0, 3)) == "-0.50 [-1.50,+0.50]" and difference(Estimate(0.5, None, 1)) == "+0.50"
    )
