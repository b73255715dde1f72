"""How Sphinx makes the site of these pages and of the docstrings: `make docs`.

The pages read well without it. Navigation is therefore here and not in them, and what Sphinx would only warn of ends the
build (`--fail-on-warning`): a broken link, a page that nobody reaches, a docstring that can't be read.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import peft_moe_merge

DOCS = Path(__file__).parent

NAVIGATION = {
    "Begin": ["start", "concepts"],
    "Guides": ["folder", "mtil", "choose", "inference", "hub", "distributed", "contributing"],
    "Reference": ["tuner", "stream"],
    "API": ["api/tuner", "api/callbacks", "api/selection", "api/inference", "api/wemoe", "api/mtil"],
    "Measured": ["results", "merging", "selection", "fusion", "wemoe", "router", "theory", "performance"],
}
"""Pages by headings. A page that is in none of them is at the end of the last."""

project = "peft_moe_merge"
version = release = peft_moe_merge.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
suppress_warnings = ["config.cache"]  # functions below can't be pickled, and every build is a fresh one

html_theme = "furo"
html_title = f"{project} {release}"
html_show_sourcelink = html_show_copyright = False

myst_heading_anchors = 4
highlight_language = "none"
default_role = "literal"  # in docstrings `this` is code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80

RESOURCES = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
RESOURCES |= {"embed": "src", "object": "data", "link": "href"}
ELSEWHERE = re.compile(r"\s*(?:[a-z]+:)?//", re.IGNORECASE)
STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:[a-z]+:)?//[^"')\s;]+)""", re.IGNORECASE)


class Resources(HTMLParser):
    """Collects what a page makes a browser load from elsewhere; what a reader may click on is none of it."""

    def __init__(self, html: str):
        super().__init__()
        self.elsewhere = STYLE.findall(html)
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        address = dict(attributes).get(RESOURCES.get(tag)) or ""
        if ELSEWHERE.match(address):
            self.elsewhere.append(address)


def refuse_resources_from_elsewhere(app, exception):
    """End a build whose pages would load fonts, scripts, styles or pictures from other sites."""
    if exception is not None:
        return
    site = Path(app.outdir)
    found = {page: Resources(page.read_text()).elsewhere for page in site.rglob("*.html")}
    found |= {sheet: STYLE.findall(sheet.read_text()) for sheet in site.rglob("*.css")}
    if told := [f"{path.relative_to(site)}: {', '.join(urls)}" for path, urls in found.items() if urls]:
        raise RuntimeError("The site must work offline, but loads from elsewhere:\n" + "\n".join(told))


def navigation() -> dict[str, list[str]]:
    """Return the headings with all pages there are."""
    named = {page for pages in NAVIGATION.values() for page in pages} | {"index"}
    others = sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in named)
    *first, last = NAVIGATION
    return {**{heading: NAVIGATION[heading] for heading in first}, last: [*NAVIGATION[last], *others]}


def read_as_a_site(app, page, source):
    """Make of Markdown outside of these pages a download; put below the first page what it does not show as a file."""
    source[0] = re.sub(r"\[([^\]`]+)\]\((\.\./[^)#]+\.md)\)", r"{download}`\1 <\2>`", source[0])
    if page == "index":
        for heading, pages in navigation().items():
            entries = "\n".join(pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```\n"


def read_as_markdown(app, what, name, thing, options, lines):
    """What docstrings write as in Markdown, as Sphinx reads it: code, fenced or indented, and names in brackets."""
    read, before, fenced = [], "", False
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
            line = "::" if fenced else ""
            read += ["", line, ""]
        elif fenced:
            read.append(f"    {line}")
        else:
            after_text = before and not before.startswith((" ", "::"))
            if line.startswith("    ") and after_text and not read[-1].strip():
                read += ["::", ""]
            read.append(re.sub(r"\[(`[^`]+`)\]", r"\1", line))
        before = line or before
    lines[:] = read


def setup(app):
    app.connect("source-read", read_as_a_site)
    app.connect("autodoc-process-docstring", read_as_markdown, priority=100)  # before napoleon
    app.connect("build-finished", refuse_resources_from_elsewhere)
