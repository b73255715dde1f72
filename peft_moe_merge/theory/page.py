"""What a study leaves on disk: a picture for each figure, the numbers as JSON, and one page that needs nothing else."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from peft_moe_merge.report.page import Picture, Section, TextTable, page, picture, write_file, write_report_files
from peft_moe_merge.report.statistics import RULE
from peft_moe_merge.report.tables import Rows

from .claims import Claim, check_claims, show
from .figures import draw_all
from .simulate import Run
from .specialisation import MEASURES
from .study import Study

TITLE = "When to stop the router"
MARKS = {"holds": "good", "holds in part": "fair", "does not hold": "bad", "no": "bad"}


def write_study(study: Study, folder: Path) -> list[Claim]:
    """Check a study's claims and write its pictures (`*.png`), `results.json` and `index.html`.

    Every file appears complete or not at all; the page comes last.

    Args:
        study: the runs.
        folder: where to write; made if it is not there.

    Returns:
        The claims with their verdicts.
    """
    claims = check_claims(study)
    pictures = [picture(name, *drawn) for name, drawn in draw_all(study).items()]
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "results.json", json.dumps(_numbers(study, claims), indent=1, allow_nan=False).encode())
    write_report_files(folder, "index.html", _page(study, claims, pictures), pictures)
    return claims


def final_table(study: Study) -> Rows:
    """Forgetting and error at some rounds, mean and half of the 95 % interval, first row the header."""
    marks = [t for t in (100, 250, 500, 1000) if t < study.base.rounds] + [study.base.rounds]
    rows = [["experts", "gate", *(f"forgetting @{t}" for t in marks), *(f"error @{t}" for t in marks)]]
    named = [("1", "none", study.single)]
    for m in study.stopped:
        named += [(str(m), "stops", study.stopped[m]), (str(m), "never stops", study.endless[m])]
    named += [(str(run.setting.experts), f"oracle, by {kind}", run) for kind, run in study.oracles.items()]
    for count, gate, run in named:
        cells = [show(curve[:, t - 1]) for curve in (run.forgetting_ST, run.error_ST) for t in marks]
        rows.append([count, gate, *cells])
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


def _page(study: Study, claims: list[Claim], pictures: list[Picture]) -> str:
    base = study.base
    claim_rows = [["", "claim", "here", "criteria met"]]
    for claim in claims:
        met = f"{sum(criterion.holds for criterion in claim.criteria)} of {len(claim.criteria)}"
        claim_rows.append([claim.name, claim.statement, claim.verdict, met])
    settings = [["setting", "value"], *([name, str(value)] for name, value in asdict(base).items())]
    return page(
        TITLE,
        f"{len(study.seeds)} seeds, {base.rounds} rounds, {base.tasks} tasks in {base.clusters} clusters, {base.features} "
        f"features, {base.samples} samples a round. {RULE} So are bands; comparisons are paired by seed and hold when all of "
        "the interval says so. The constants are ours, not those of the paper whose setting this is (arXiv 2406.16437).",
        [
            Section("Claims", [TextTable(claim_rows, text=True, marks=MARKS)]),
            Section("Forgetting and error", [TextTable(final_table(study))]),
            Section("Pictures", list(pictures)),
            Section("Every criterion", [_criteria(claim) for claim in claims]),
            Section("Setting", [TextTable(settings, text=True)]),
        ],
    )


def _criteria(claim: Claim) -> TextTable:
    rows = [["asked", "measured", "holds"]]
    rows += [[one.asked, one.measured, "yes" if one.holds else "no"] for one in claim.criteria]
    return TextTable(rows, title=f"{claim.name}: {claim.verdict}", text=True, marks=MARKS)
