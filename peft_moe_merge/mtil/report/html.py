"""Results as one page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path
from typing import Any

from peft_moe_merge.files import whole

from .anchors import anchor_notes
from .figures import draw_all
from .statistics import BASELINE
from .tables import (
    COMPARED,
    SELECTION_CAPTION,
    Rows,
    matrix_rows,
    selected_rows,
    selection_rows,
    summary_caption,
    summary_rows,
    task_rows,
)

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 70rem; margin: 3rem auto; padding: 0 1.5rem; color: #1d2329; background: #fff; }
h1 { font-size: 1.9rem; margin-bottom: .3rem; } h2 { font-size: 1.3rem; margin: 3rem 0 .6rem; border-bottom: 1px solid #d8dde2; }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid #e4e8ec; vertical-align: top; }
th { font-weight: 600; border-bottom-color: #89929b; } th:first-child, td:first-child { text-align: left; white-space: nowrap; }
figure { margin: 1.2rem 0 2.2rem; } img { max-width: 100%; height: auto; } figcaption, .note { color: #56606a; font-size: .88rem; }
.settings td { text-align: left; word-break: break-word; }
"""
DPI = 144
SECTIONS = {
    "metrics": "Transfer, Average, Last",
    "accuracy": "Accuracy after each task",
    "selection": "Which task is an image from?",
    "frozen": "Frozen experts",
    "usage": "Which experts a task uses",
    "merges": "Merges",
    "losses": "Training loss",
}


def write_report(results: dict[str, Any], folder: Path, baseline: str = BASELINE) -> list[Path]:
    """Write `report.html`, and its pictures also as `figures/*.png`. Each file appears whole or not at all.

    Args:
        results: what `read_results` returns.
        folder: where to write.
        baseline: the method that the others are compared with, seed by seed.

    Returns:
        The files written, the page last.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    files, pictures = [], {}
    for name, (figure, caption) in draw_all(results).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        pictures[name] = (buffer.getvalue(), caption)
        files.append(_write(folder / "figures" / f"{name}.png", buffer.getvalue()))
    page = report_page(results, pictures, baseline)
    return [*files, _write(folder / "report.html", page.encode())]


def report_page(results: dict[str, Any], pictures: dict[str, tuple[bytes, str]], baseline: str = BASELINE) -> str:
    """Compose the page from the results and from PNG pictures with their captions, by name."""
    title = f"Learning {len(results['tasks'])} tasks in sequence: suite {results['suite']}"
    parts = [
        "<!doctype html>",
        "<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        # the browser would ask for an icon; this one is empty
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p class='note'>Tasks in order: {escape(', '.join(results['tasks']))}.</p>",
        "<h2>Summary</h2>",
        _table(summary_rows(results, baseline)),
        f"<p class='note'>{escape(summary_caption(results, baseline))} Transfer: accuracy on a task before it is learnt; "
        "Average: over the whole stream; Last: at its end; Forgetting: what is lost of the best.</p>",
    ]
    if rows := selection_rows(results):
        parts += ["<h2>Choosing the task</h2>", _table(rows), f"<p class='note'>{escape(SELECTION_CAPTION)}</p>"]
        parts += ["<h3>Own task chosen when all are learnt, percent</h3>", _table(selected_rows(results))]
    for kind, heading in SECTIONS.items():
        shown = {name: picture for name, picture in pictures.items() if name == kind or name.startswith(f"{kind}_")}
        if shown:
            parts += [f"<h2>{heading}</h2>", *(_figure(name, *picture) for name, picture in shown.items())]
    parts.append("<h2>Per task</h2>")
    for metric in COMPARED:
        parts += [f"<h3>{metric.capitalize()}</h3>", _table(task_rows(results, metric))]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in anchor_notes(results)]
    for name, runs in results["methods"].items():
        if len(runs) == 1:
            parts += [f"<h3>{escape(name)}: accuracy matrix</h3>", _table(matrix_rows(results["tasks"], runs[0]))]
    for heading in ("settings", "versions"):
        rows = [[heading.removesuffix("s"), ""], *([name, str(value)] for name, value in results[heading].items())]
        parts += [f"<h2>{heading.capitalize()}</h2>", f"<div class='settings'>{_table(rows)}</div>"]
    return "\n".join([*parts, "</body></html>\n"])


def _figure(name: str, png: bytes, caption: str) -> str:
    data, text = base64.b64encode(png).decode(), escape(caption)
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # so that letters are of one size in all pictures
    image = f"<img src='data:image/png;base64,{data}' width='{width}' alt='{text}'>"
    return f"<figure id='{escape(name)}'>{image}<figcaption>{text}.</figcaption></figure>"


def _table(rows: Rows) -> str:
    lines = [
        "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(["th"] + ["td"] * (len(rows) - 1), rows, strict=True)
    ]
    return f"<div class='table'><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _write(path: Path, content: bytes) -> Path:
    with whole(path) as partial:
        partial.write_bytes(content)
    return path
