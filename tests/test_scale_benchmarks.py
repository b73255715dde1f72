"""The benchmarks of scale: curves are carried on as they are, and all of them run in their smallest form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import thousand_tasks
from thousand_tasks import growth_of, trend

BENCHMARKS = Path(thousand_tasks.__file__).parent


def test_a_line_is_carried_on_and_a_parabola_bends():
    line = trend([3.0 + 2.0 * tasks for tasks in range(1, 101)])
    assert line["slope"] == pytest.approx(2.0) and line["far"] == pytest.approx(2003.0)
    assert line["residual"] == pytest.approx(0, abs=1e-9) and line["bend"] == pytest.approx(0, abs=1e-9)
    assert growth_of(line, 203.0) == "grows"
    parabola = trend([3.0 + 0.05 * tasks**2 for tasks in range(1, 101)])
    assert growth_of(parabola, 503.0) == "bends up" and parabola["bend"] > 0.05
    flat = trend([5.0 + (-1) ** tasks for tasks in range(100)])
    assert growth_of(flat, 5.0) == "flat" and flat["far"] == pytest.approx(5.0, abs=1.0)


def test_a_row_that_was_lost_is_left_out():
    values = [3.0 + 2.0 * tasks for tasks in range(1, 101)]
    values[50] = float("nan")
    assert trend(values)["far"] == pytest.approx(2003.0)


def run(*command, **environment):
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_a_thousand_tasks_go_on_where_they_stopped(tmp_path):
    script = BENCHMARKS / "thousand_tasks.py"
    first = run(sys.executable, script, "--quick", "--output", tmp_path)
    assert "line at 1000" in first and "mini, ridge" in first
    measured = json.loads((tmp_path / "checkpoints" / "learnt.json").read_text())
    assert len(measured) == 4 and all(row["written"] < 0.4 * measured[-1]["stored"] for row in measured[2:])
    again = run(sys.executable, script, "--quick", "--output", tmp_path)
    assert json.loads((tmp_path / "checkpoints" / "learnt.json").read_text()) == measured, "nothing is done twice"
    assert (
        run(sys.executable, script, "--only_show", "--output", tmp_path).splitlines()[-5:] == again.splitlines()[-5:]
    )
    assert (tmp_path / "thousand_tasks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_banks_are_compared(tmp_path):
    run(sys.executable, BENCHMARKS / "bank_designs.py", "--quick", "--output", tmp_path / "banks.json")
    rows = json.loads((tmp_path / "banks.json").read_text())["measured"]["8"]
    for kind in ("fused", "foreach"):
        assert (
            rows[f"apart, {kind}"]["moved"] == rows[f"kept, {kind}"]["moved"] == 0 < rows[f"stacked, {kind}"]["moved"]
        )
    assert rows["stacked, fused"]["graphs"] == 1 < rows["apart, fused"]["graphs"]


@pytest.mark.slow
def test_what_a_gpu_is_to_run_runs_on_a_cpu(tmp_path):
    told = run(BENCHMARKS / "gpu.sh", "--dry", tmp_path / "gpu", PYTHON=sys.executable)
    assert told.splitlines()[-1] == f"== all of it is in {tmp_path / 'gpu'}"
    names = {path.name for path in (tmp_path / "gpu").glob("*.json")}
    scripts = ("step_time", "pool_step_time", "selection_cost", "serving", "wemoe_forward", "input_cost")
    assert names == {f"{name}.json" for name in scripts}
    assert (tmp_path / "gpu" / "stream_bf16" / "results.json").exists()
