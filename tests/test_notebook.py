"""The notebook of the examples, executed as a user would, but against a Hub on this machine."""

import json
from pathlib import Path

import nbformat
from hub.loopback import OWNER_TOKEN, LoopbackHub
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"

ASK = """
import json

told = {"before": before, "after": after, "plain": plain, "learnt": learnt, "chosen": chosen, "name": name}
told["local"], told["published"] = ([one.task, one.label, one.score] for one in (prediction, published))
with open("told.json", "w") as file:
    json.dump(told, file)
"""


def test_quickstart(hub: LoopbackHub, tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(ASK))
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute(env=hub.environment(tmp_path / "home", OWNER_TOKEN))
    told = json.loads((tmp_path / "told.json").read_text())
    digits, flowers = told["before"]["digits"], told["before"]["flowers"]
    assert len(digits) == len(flowers) == 2 and not set(digits) & set(flowers), "each task had two of its own"
    shapes = told["after"]["shapes"]
    assert len(shapes) == 2 and not set(shapes) & {*told["after"]["digits"], *told["after"]["flowers"]}
    assert len({*told["after"]["digits"], *told["after"]["flowers"]}) == 2, "four experts became two to make room"
    gained = [told["learnt"][task] - told["plain"][task] for task in told["plain"]]
    assert sum(gained) / len(gained) > 0.1, "all three were learnt, and kept"
    assert min(told["chosen"].values()) > 0.6, "by chance a third, and none is a choice too"
    assert told["published"][:2] == told["local"][:2] and abs(told["published"][2] - told["local"][2]) < 1e-4
    assert hub.asked(f"POST .*{told['name']}/commit/main")


def test_no_outputs_are_kept() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
