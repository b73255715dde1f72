"""Selectors in the stream: against routing by hand, resumed to the same bits, told in results, tables and report."""

import json

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from peft_moe_merge.mtil.checkpoint import Progress, newest
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, Method, MethodSettings, Routed
from peft_moe_merge.mtil.report.html import write_report
from peft_moe_merge.mtil.report.tables import print_results, selection_rows
from peft_moe_merge.mtil.results import empty_results, run_result, selected_right, write_results
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.stream import StreamSettings, run_stream
from peft_moe_merge.selection import load_selector

SELECTION = SelectorSettings(selectors=["gaussian", "text"], selector_batch=50, reject_rate=0.1)
METHOD = MethodSettings(num_experts=6, r=4, merge_every=4)


@pytest.fixture(scope="module")
def tasks():
    return load_digit_tasks()


def run(folder, tasks, name="moe_lora_merge", selection=SELECTION, **kwargs):
    settings = StreamSettings(steps=8, batch_size=16, lr=[5e-3])
    accelerator = Accelerator(cpu=True)
    kept = []

    def build():
        kept.append(METHODS[name](*load_clip(mini_clip_path()), METHOD))
        return kept[-1]

    progress = run_stream(tasks, build, settings, folder, accelerator, seed=5, selection=selection, **kwargs)
    return progress, kept[-1]


@pytest.fixture(scope="module")
def straight(tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return *run(folder, tasks), folder


@torch.no_grad()
def by_hand(method, selector, task, together):
    """Route every image of a task by the selector, one by one or so many neighbours together, and count."""
    model, right, chosen, margins = method.model, 0, [], []
    (batch,) = eval_batches(task.test, method.processor.image_processor, batch_size=len(task.test))
    scores = selector.scores(model.frozen_features(selector.source, batch["pixel_values"]))
    texts = {}
    for start in range(0, len(scores), together):
        mean = scores[start : start + together].double().mean(dim=0)
        best = int(mean.argmax())
        bars = selector.thresholds(len(scores[start : start + together]))
        margins += [float(mean[best] - bars[best])] * len(scores[start : start + together])
        chosen += [best if margins[-1] >= 0 else -1] * len(scores[start : start + together])
    for image, label, router in zip(batch["pixel_values"], batch["labels"], chosen, strict=True):
        model.set_task(None if router == -1 else method.learnt[router])
        if router not in texts:
            texts[router] = method.encode_classes(LabelSpace.of_task(task).prompts, torch.device("cpu"))
        right += int((method.image_features(image[None]) @ texts[router].T).argmax() == label)
    return 100 * right / len(chosen), chosen, margins


def test_against_routing_by_hand(tasks, straight):
    progress, method, folder = straight
    method.model.eval()
    assert len(progress.selection) == 3 and progress.selector_bytes["gaussian"] > 0
    told = progress.selection[-1]["gaussian"]
    selector = load_selector(folder / "after_3" / "selectors" / "gaussian")
    assert selector.tasks == [task.name for task in tasks] and selector.reject_rate == 0.1
    for decision, together in (("per_image", 1), ("per_batch", 50)):
        accuracy, chosen, _ = by_hand(method, selector, tasks[1], together)
        assert told[decision]["accuracies"][1] == pytest.approx(accuracy)
        expected = [chosen.count(0), chosen.count(1), chosen.count(2), chosen.count(-1)]
        assert told[decision]["confusion"][1] == expected and sum(expected) == len(tasks[1].test)
    assert all(stage["gaussian"]["per_image"]["auroc"] is not None for stage in progress.selection[:2])
    assert told["per_image"]["auroc"] is None, "nothing is left to learn"


def test_candidates_tell_the_task(tasks, straight):
    """The classes of a learnt data set leave its task, those of one to come none: plain CLIP, as before the stream."""
    progress, _, _ = straight
    plain = [stage["gaussian"]["candidates"]["accuracies"] for stage in progress.selection]
    for learnt, stage in enumerate(progress.selection, start=1):
        told = stage["gaussian"]["candidates"]
        for position, task in enumerate(tasks):
            column = position if position < learnt else len(tasks)
            assert told["confusion"][position] == [
                len(task.test) * (other == column) for other in range(len(tasks) + 1)
            ]
            if position < learnt:
                assert told["accuracies"][position] == pytest.approx(progress.matrix[learnt - 1][position])
        assert told["auroc"] is None
    assert plain[0][2] == plain[1][2]


def test_auroc_after_the_first_task(tasks, tmp_path):
    progress, method = run(tmp_path, tasks, stop_after=1)
    method.model.eval()
    selector = load_selector(tmp_path / "after_1" / "selectors" / "gaussian")
    margins, unknown = [], []
    for position, task in enumerate(tasks):
        margins += by_hand(method, selector, task, 1)[2]
        unknown += [position >= 1] * len(task.test)
    told = progress.selection[0]["gaussian"]["per_image"]["auroc"]
    assert told == pytest.approx(roc_auc_score(unknown, [-margin for margin in margins]), abs=1e-6)


def test_without_thresholds(tasks, tmp_path):
    """With `reject_rate` 0 no image is of none, and nothing tells those of tasks to come from the others."""
    selection = SelectorSettings(selectors=["gaussian"], reject_rate=0)
    told = run(tmp_path, tasks, selection=selection, stop_after=1)[0].selection[0]["gaussian"]["per_image"]
    assert told["auroc"] == 0.5 and all(row[-1] == 0 for row in told["confusion"])


def test_selectors_change_nothing_and_resume(tasks, straight, tmp_path):
    progress, _, folder = straight
    without, _ = run(tmp_path / "without", tasks, selection=None)
    assert (without.matrix, without.losses) == (progress.matrix, progress.losses)
    assert without.stored_bytes == progress.stored_bytes, "that of the method, not of what is evaluated with it"
    run(tmp_path / "cut", tasks, stop_after=2)
    resumed, _ = run(tmp_path / "cut", tasks, resume=True)
    assert resumed.selection == progress.selection
    for name in SELECTION.selectors:
        ours, other = (
            load_file(newest(place) / "selectors" / name / "selector.safetensors")
            for place in (folder, tmp_path / "cut")
        )
        assert ours.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in ours.items())
    with pytest.raises(ValueError, match=r"other settings: .*reject_rate was 0.1, is 0.2"):
        run(tmp_path / "cut", tasks, selection=SelectorSettings(["gaussian", "text"], reject_rate=0.2), resume=True)


class Foreign(Method):
    """A method that is no mixture to the stream, and has routers all the same: it hands everything on to one."""

    name = "foreign"

    def __init__(self, clip, processor, settings):
        super().__init__(clip, processor, settings)
        self.inner = METHODS["moe_lora_merge"](clip, processor, settings)
        self.learnt = self.inner.learnt
        for hook in (
            "trainable_parameters",
            "loss",
            "after_step",
            "end_task",
            "prepare_evaluation",
            "image_features",
            "encode_classes",
            "save",
            "set_task",
            "frozen_features",
            "routed_image_features",
        ):
            setattr(self, hook, getattr(self.inner, hook))

    def begin_task(self, task):
        self.inner.begin_task(task)
        self.model = self.inner.model

    def history(self):
        return {"blocks": len(self.inner.history()["frozen"])}

    def set_task(self, task): ...

    def frozen_features(self, source, pixel_values): ...

    def routed_image_features(self, pixel_values, task_ids): ...

    def save(self, folder): ...

    def load(self, folder): ...


def test_any_method_with_routers_is_tried(tasks, straight, tmp_path, monkeypatch):
    """The stream asks for what a method can do, not for what it is."""
    monkeypatch.setitem(METHODS, "foreign", Foreign)
    assert isinstance(Foreign(*load_clip(mini_clip_path()), METHOD), Routed)
    progress, _ = run(tmp_path, tasks, "foreign")
    assert (progress.matrix, progress.losses) == (straight[0].matrix, straight[0].losses)
    assert progress.selection == straight[0].selection
    assert progress.history == [{"blocks": 6}] * 3
    told = run_result(5, progress)
    assert told["blocks"] == [6, 6, 6] and told["merges"] == told["frozen"] == told["usage"] == []
    assert not any(
        isinstance(METHODS[name](*load_clip(mini_clip_path()), METHOD), Routed) for name in ("lora", "zscl")
    )


def test_methods_without_routers_pass(tasks, tmp_path):
    progress, _ = run(tmp_path, tasks, "zero_shot")
    assert progress.selection == [] and run_result(0, progress)["selection"] == {}


def test_bad_settings():
    with pytest.raises(ValueError, match="Unknown selectors \\['oracle'\\]"):
        SelectorSettings(["oracle"])
    with pytest.raises(ValueError, match="`selector_features` must be"):
        SelectorSettings(selector_features="dreams")
    with pytest.raises(ValueError, match="`reject_rate`"):
        SelectorSettings(["gaussian"], reject_rate=1.5)
    with pytest.raises(ValueError, match="`selector_batch`"):
        SelectorSettings(selector_batch=0)


def test_what_is_right():
    confusion = [[8, 1, 0, 1], [2, 2, 0, 6], [0, 0, 0, 10]]  # after two of three tasks; the last column is none
    assert selected_right(confusion, 2) == [80.0, 20.0, 100.0]
    assert selected_right(confusion, 3) == [80.0, 20.0, 0.0]


def test_results_tables_and_page(tmp_path):
    def stage(accuracies, confusion, auroc):
        one = {"accuracies": accuracies, "confusion": confusion, "auroc": auroc}
        return {"gaussian": {"per_image": one, "per_batch": one}}

    progress = Progress(settings={}, matrix=[[80.0, 30.0], [70.0, 90.0]], selector_bytes={"gaussian": 4096})
    progress.selection = [
        stage([78.0, 24.0], [[9, 0, 1], [5, 0, 5]], 0.75),
        stage([68.5, 87.5], [[8, 1, 1], [0, 10, 0]], None),
    ]
    results = empty_results("mini", ["birds", "<cars>"], {"selector_batch": 64})
    results["methods"] = {
        "moe_lora_merge": [run_result(0, progress)],
        "zero_shot": [run_result(0, Progress({}, [[1.0, 2.0]] * 2))],
    }
    told = results["methods"]["moe_lora_merge"][0]["selection"]["gaussian"]
    assert (
        told["bytes_per_task"] == 4096 and told["per_image"]["transfer"] == 24.0 and told["per_image"]["last"] == 78.0
    )
    assert told["per_image"]["selected_right"] == [[90.0, 50.0], [80.0, 100.0]]
    heading, truth, image, batch = selection_rows(results)
    row = dict(zip(heading, image, strict=True))
    assert row["Transfer"] == "24.00" and row["Δ Last"] == "-2.00" and row["right %"] == "80.0"
    assert row["AUROC of none"] == "0.750" and dict(zip(heading, truth, strict=True))["Last"] == "80.00"
    assert batch[2] == "per batch of 64"
    console = Console(record=True, width=200)
    print_results(results, console)
    assert "per batch of 64" in console.export_text()
    write_results(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text())["methods"]["moe_lora_merge"][0]["selection"]
    page = write_report(results, tmp_path)[-1].read_text()
    assert (tmp_path / "figures" / "selection_moe_lora_merge_gaussian.png").stat().st_size > 5000
    assert "Choosing the task" in page and "&lt;cars&gt;" in page and "<cars>" not in page and "4,096" in page
