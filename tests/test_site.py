"""What makes the site strict beside Sphinx itself. The site is built by `make docs`."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def conf() -> dict:
    return runpy.run_path(str(DOCS / "conf.py"))


def test_every_page_is_in_the_navigation_once(conf):
    listed = [page for pages in conf["navigation"]().values() for page in pages]
    pages = [
        path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*") if path.suffix in (".md", ".rst")
    ]
    assert sorted([*listed, "index"]) == sorted(pages)
    source = ["# First page\n"]
    conf["read_as_a_site"](None, "index", source)
    assert all(f"\n{page}\n" in source[0] for page in listed)


@pytest.mark.parametrize(
    "loads",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="" src="HTTP://example.org/a.png">',
        '<style>@import "https://fonts.example/a.css";</style>',
        '<p style="background: url(https://example.org/a.png)">',
    ],
)
def test_resources_from_elsewhere_end_the_build(conf, loads, tmp_path):
    page = tmp_path / "api" / "page.html"
    page.parent.mkdir()
    fine = '<a href="https://example.org">a link</a><img src="../a.png"><script src="a.js"></script>'
    app = SimpleNamespace(outdir=tmp_path)
    page.write_text(fine)
    conf["refuse_resources_from_elsewhere"](app, None)
    page.write_text(fine + loads)
    with pytest.raises(RuntimeError, match=r"api/page.html: \S+example"):
        conf["refuse_resources_from_elsewhere"](app, None)
    conf["refuse_resources_from_elsewhere"](app, ValueError("the build failed by itself"))


def test_style_sheets_are_read_too(conf, tmp_path):
    (tmp_path / "a.css").write_text("@font-face { src: url('https://fonts.example/a.woff2') }")
    with pytest.raises(RuntimeError, match="a.css: https://fonts.example/a.woff2"):
        conf["refuse_resources_from_elsewhere"](SimpleNamespace(outdir=tmp_path), None)


def test_docstrings_become_what_sphinx_reads(conf):
    lines = [
        "Do it.",
        "",
        "    do(it)",
        "",
        "As [`That`] does:",
        "",
        "```python",
        "that()",
        "```",
        "Args:",
        "    it: what.",
    ]
    conf["read_as_markdown"](None, "function", "do", None, None, lines)
    text = "\n".join(lines)
    assert "Do it.\n\n::\n\n    do(it)" in text and "As `That` does:\n" in text
    assert "\n::\n\n    that()\n" in text and "```" not in text and text.endswith("Args:\n    it: what.")
