"""The study of where merging pays: what its columns count, and that files of its runs become its tables."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import merging_regimes
import pytest
from pools import clip_pool

SCRIPT = Path(merging_regimes.__file__)


def test_related_and_many_tasks():
    related = merging_regimes.tasks_of("few", 100)
    assert len(related) == 20 and max(len(task.train) for task in related) <= 15
    assert {task.name.rsplit("_", 1)[0] for task in related} == set(merging_regimes.RELATED)
    assert [task.name for task in merging_regimes.tasks_of("few", 101)] != [task.name for task in related]


def test_merged_is_the_share_of_choices_that_lead_to_common_experts():
    model = clip_pool(["a", "b", "c"], experts_per_task=2)  # 0 1, 2 3, 4 5
    share = merging_regimes.merged_share
    assert share(SimpleNamespace(model=model)) == 0
    for routers in model.router_banks().values():
        routers.columns.redirect(2, 0)  # a: 0 1, b: 0 3, c: 4 5
    assert share(SimpleNamespace(model=model)) == pytest.approx(100 * 2 / 6)
    for routers in model.router_banks().values():
        routers.columns.redirect(5, 4)  # c alone has 4 twice: nobody shares it
    assert share(SimpleNamespace(model=model)) == pytest.approx(100 * 2 / 6)


def test_files_become_tables(tmp_path):
    names = {merging_regimes.name_of(r, v) for r, (_, of_r) in merging_regimes.REGIMES.items() for v in of_r}
    assert len(names) == sum(len(variants) for _, variants in merging_regimes.REGIMES.values()), "a file for each"
    for variant, last in (
        ("10: merged", 60.0),
        ("10: random pair", 58.0),
        ("no bound", 70.0),
        ("no bound, slow", 75.0),
    ):
        for seed in (100, 101):
            run = {"seed": seed, "just_learnt": 71.0, "last": last + seed % 100, "merged": 40.0}
            (tmp_path / f"{merging_regimes.name_of('few', variant)}_{seed}.json").write_text(json.dumps(run))
    command = [sys.executable, str(SCRIPT), "--only_show", "--markdown", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    rows = {row.split("|")[1].strip(): row for row in done.splitlines() if row.startswith("|")}
    assert "-2.00" in rows["10: random pair"] and "40.0" in rows["10: random pair"]
    assert "60.5" in rows["10: merged"] and "70.5" in rows["no bound"] and "75.5" in rows["no bound, slow"]
    assert "many" not in done
