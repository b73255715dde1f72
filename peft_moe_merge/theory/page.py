"""What a study leaves on disk: a picture for each figure, the numbers as JSON, and one page that needs nothing else."""

import base64
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from pathlib import Path

import torch

from peft_moe_merge.files import whole

from .claims import Claim, judge, show
from .figures import draw_all
from .simulate import Run
from .specialisation import MEASURES
from .study import Study

STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { border-bottom: 1px solid #ccc; padding: .3rem .8rem; text-align: left; }
img { max-width: 100%; } figcaption { color: #555; } figure { margin: 2rem 0; }
.holds { color: #00704f; } .in-part { color: #8a5a00; } .not { color: #b03000; }
"""
MARKS = {"holds": "holds", "holds in part": "in-part", "does not hold": "not"}


def write_study(study: Study, folder: Path) -> list[Claim]:
    """Judge a study and write its pictures (`*.png`), `results.json` and `index.html`.

    Every file appears complete or not at all; the page comes last.

    Args:
        study: the runs.
        folder: where to write; made if it is not there.

    Returns:
        The claims with their verdicts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = judge(study)
    pictures = {}
    for name, (figure, caption) in draw_all(study).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pictures[name] = (buffer.getvalue(), caption)
        _write(folder / f"{name}.png", buffer.getvalue())
    _write(folder / "results.json", json.dumps(_numbers(study, claims), indent=1, allow_nan=False).encode())
    _write(folder / "index.html", _page(study, claims, pictures).encode())
    return claims


def final_table(study: Study) -> list[tuple[str, ...]]:
    """Forgetting and error at some rounds, mean ± half-width of the 95 % interval, first row the header."""
    marks = [t for t in (100, 250, 500, 1000) if t < study.base.rounds] + [study.base.rounds]
    rows = [("experts", "gate", *(f"forgetting @{t}" for t in marks), *(f"error @{t}" for t in marks))]
    named = [("1", "none", study.single)]
    for m in study.stopped:
        named += [(str(m), "stops", study.stopped[m]), (str(m), "never stops", study.endless[m])]
    named += [(str(run.setting.experts), f"oracle, by {kind}", run) for kind, run in study.oracles.items()]
    for count, gate, run in named:
        cells = [show(curve[:, t - 1]) for curve in (run.forgetting_ST, run.error_ST) for t in marks]
        rows.append((count, gate, *cells))
    return rows


def _numbers(study: Study, claims: list[Claim]) -> dict:
    groups = {name: getattr(study, name) for name in ("stopped", "endless", "oracles", "explore", "noise", "flags")}
    runs = {"single": study.single} | {
        f"{name}/{'/'.join(map(str, key)) if isinstance(key, tuple) else key}": run
        for name, group in groups.items()
        for key, run in group.items()
    }
    return {
        "setting": asdict(study.base),
        "seeds": list(study.seeds),
        "torch": torch.__version__,
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims],
        "runs": {name: _final(run) for name, run in runs.items()},
    }


def _final(run: Run) -> dict:
    values = {"forgetting": run.forgetting_ST[:, -1], "error": run.error_ST[:, -1], "frozen_at": run.frozen_at_S}
    if run.setting.routing == "gate" and run.setting.experts > 1:
        values |= {name: measure(run) for name, measure in MEASURES.items()}
    # JSON has no nan: what is undefined for a seed is null.
    return {name: [None if x != x else x for x in values_S.tolist()] for name, values_S in values.items()}


def _page(study: Study, claims: list[Claim], pictures: dict[str, tuple[bytes, str]]) -> str:
    base = study.base
    claim_rows = [("", "claim", "here", "criteria met")] + [
        (c.name, c.statement, c.verdict, f"{sum(k.holds for k in c.criteria)} of {len(c.criteria)}") for c in claims
    ]
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>When to stop the router</title>",
        f"<style>{STYLE}</style><h1>When to stop the router</h1>",
        f"<p>{len(study.seeds)} seeds, {base.rounds} rounds, {base.tasks} tasks in {base.clusters} clusters, "
        f"{base.features} features, {base.samples} samples a round. ± and bands: 95 % intervals over seeds. The constants are "
        "our own, not those of the paper whose setting this is (arXiv 2406.16437).</p>",
        "<h2>Claims</h2>",
        _table(claim_rows, mark=MARKS.get),
        "<h2>Forgetting and error</h2>",
        _table(final_table(study)),
        "<h2>Pictures</h2>",
    ]
    for name, (png, caption) in pictures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f"<figure id='{name}'><img src='data:image/png;base64,{data}' alt='{escape(caption, quote=True)}'>"
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    parts.append("<h2>Every criterion</h2>")
    for claim in claims:
        rows = [("asked", "measured", "holds")] + [
            (k.asked, k.measured, "yes" if k.holds else "no") for k in claim.criteria
        ]
        parts += [f"<h3>{escape(claim.name)}: {escape(claim.verdict)}</h3>", _table(rows)]
    settings = [("setting", "value")] + [(name, str(value)) for name, value in asdict(base).items()]
    parts += ["<h2>Setting</h2>", _table(settings), "</html>"]
    return "\n".join(parts)


def _table(rows: list[tuple[str, ...]], mark: Callable[[str], str | None] = lambda cell: None) -> str:
    def line(row: tuple[str, ...], tag: str) -> str:
        cells = (f"<{tag} class='{mark(cell) or ''}'>{escape(cell)}</{tag}>" for cell in row)
        return f"<tr>{''.join(cells)}</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _write(path: Path, content: bytes) -> None:
    with whole(path) as partial:
        partial.write_bytes(content)
