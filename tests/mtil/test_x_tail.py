"""X-TAIL: all classes of all tasks, nobody names the task; and soft choices. Against one image and one prompt at a time."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from rich.console import Console

from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import DataSettings
from peft_moe_merge.mtil.experiment import Experiment
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.report.html import write_report
from peft_moe_merge.mtil.report.tables import print_results, x_tail_rows
from peft_moe_merge.mtil.results import empty_results, run_result, write_results
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings, run_stream
from peft_moe_merge.selection import load_selector

SELECTORS = ["discriminant_classes", "gaussian"]  # with a posterior, of tasks and classes, and without any
DECISIONS = ("per_image", "soft", "per_image_own", "soft_own", "soft_fused")
NAMES = (("zero", "one", "two", "three"), ("four", "five", "six"), ("seven", "Eight", "ONE"))
TEMPLATES = (("the digit {}.", "a {}."), ("the digit {}.",), ("a {}.", "written: {}."))
METHOD = MethodSettings(pool_r=4, lora_r=4, exemplars=20)


@pytest.fixture(scope="module")
def tasks():
    """Digits, few of them; the first and the last task have a class of the same name."""
    made = []
    for task, names, templates in zip(load_digit_tasks(), NAMES, TEMPLATES, strict=True):
        train, test = task.train.select(range(48)), task.test.select(range(12))
        made.append(dataclasses.replace(task, class_names=names, templates=templates, train=train, test=test))
    return made


def run(folder, tasks, name, protocol="x_tail", selectors=SELECTORS, **kwargs):
    settings = StreamSettings(steps=4, batch_size=8, lr=[5e-3], eval_batch_size=7, protocol=protocol)
    kept = []

    def build():
        kept.append(METHODS[name](*load_clip(mini_clip_path()), METHOD))
        return kept[-1]

    selection = SelectorSettings(selectors, reject_rate=0.2)
    progress = run_stream(tasks, build, settings, folder, Accelerator(cpu=True), seed=5, selection=selection, **kwargs)
    kept[-1].model.eval()
    return progress, kept[-1]


@pytest.fixture(scope="module")
def routed(tasks, tmp_path_factory):
    made = {}
    for name in ("moe_lora_pool", "lora_per_task"):
        folder = tmp_path_factory.mktemp(name)
        made[name] = *run(folder, tasks, name), folder
    return made


ALL_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
PROMPTS = [
    *([f"the digit {name}.", f"a {name}."] for name in ("zero",)),
    ["the digit one.", "a one.", "a ONE.", "written: ONE."],
    *([f"the digit {name}.", f"a {name}."] for name in ("two", "three")),
    *([f"the digit {name}."] for name in ("four", "five", "six")),
    ["a seven.", "written: seven."],
    ["a Eight.", "written: Eight."],
]


def test_each_name_is_one_class(tasks):
    space = LabelSpace.of_all(tasks)
    assert [name.lower() for name in space.names] == ALL_NAMES
    assert [list(of_class) for of_class in space.prompts] == PROMPTS
    assert space.columns[tasks[1].name].tolist() == [4, 5, 6] and space.columns[tasks[2].name].tolist() == [7, 8, 1]
    own = LabelSpace.of_task(tasks[2])
    assert own.names == NAMES[2] and own.columns == {tasks[2].name: pytest.approx(torch.arange(3))}
    same = dataclasses.replace(tasks[0], templates=("a {}.",), class_names=("one", "ONE", "_one_", "two"))
    assert LabelSpace.of_all([same]).prompts == (("a one.", "a ONE.", "a _one_."), ("a two.",))


@torch.no_grad()
def texts(method, prompts):
    """Encode classes by the route that encodes at the moment, prompt by prompt."""
    classes = []
    for of_class in prompts:
        tokens = [method.processor.tokenizer(prompt, return_tensors="pt").input_ids for prompt in of_class]
        encoded = [F.normalize(method.model.get_text_features(ids).pooler_output[0], dim=0) for ids in tokens]
        classes.append(F.normalize(sum(encoded), dim=0))
    return torch.stack(classes)


def images_of(method, task):
    (batch,) = eval_batches(task.test, method.processor.image_processor, batch_size=len(task.test))
    return batch["pixel_values"], batch["labels"]


@pytest.mark.parametrize("name", ["zero_shot", "icarl"])
def test_methods_without_routes(name, tasks, tmp_path):
    progress, method = run(tmp_path, tasks, name)
    classes = texts(method, PROMPTS)
    expected = []
    for task in tasks:
        right = 0
        for image, label in zip(*images_of(method, task), strict=True):
            best = (method.image_features(image[None]) @ classes.T).argmax().item()
            right += ALL_NAMES[best] == task.class_names[label].lower()
        expected.append(100 * right / len(task.test))
    assert [rows[0][:2] for rows in progress.x_tail] == [[None, None]] * 3
    assert progress.x_tail[-1][0][2] == pytest.approx(expected)
    assert progress.selection == []
    if name == "zero_shot":
        assert progress.x_tail[0] == progress.x_tail[2], "nothing was learnt"


@torch.no_grad()
def slowly(method, selector, tasks, task, learnt, decision, x_tail=True):
    """Classify a task's test images one by one, and count."""
    scale, right, encoded = method.model.logit_scale.exp(), 0, {}
    for image, label in zip(*images_of(method, task), strict=True):
        method.set_task(None)
        features = method.frozen_features(selector.source, image[None])
        complete = x_tail and learnt == len(tasks)
        best = selector.select(features)[0].item()
        if complete:
            best = selector.decision_function(features)[0].argmax().item()
        if decision.startswith("soft"):
            likely = (selector.temperature * selector.decision_function(features)[0].double()).softmax(0)
            none = 0.0 if complete else 0.2 if best >= 0 else 1.0
            shares = {-1: none, **{known: (1 - none) * likely[known].item() for known in range(learnt)}}
            kept = {}
            for route in sorted(shares, key=lambda route: -shares[route])[:3]:
                if sum(kept.values()) < 0.95:
                    kept[route] = shares[route]
        else:
            kept = {best: 1.0}
        by_name = {}
        for route, share in kept.items():
            method.set_task(None if route == -1 else tasks[route].name)
            names, prompts = ALL_NAMES, PROMPTS
            if not x_tail:
                names = list(task.class_names)
                prompts = [[form.format(name) for form in task.templates] for name in names]
            elif decision.endswith(("own", "fused")) and route != -1:
                names = [name.lower() for name in tasks[route].class_names]
                prompts = [PROMPTS[ALL_NAMES.index(name)] for name in names]
            if route not in encoded:
                encoded[route] = texts(method, prompts)
            logits = scale * method.image_features(image[None])[0] @ encoded[route].T
            likely = logits.double().softmax(0)
            if decision.endswith("fused") and route != -1:
                _, posterior = selector.class_posterior(features, route)  # the classes come in their order
                likely = likely * posterior[0].exp()
                likely = likely / likely.sum()
            for name, probability in zip(names, likely.tolist(), strict=True):
                by_name[name] = by_name.get(name, 0.0) + share * probability
        truth = task.class_names[label]
        right += max(by_name, key=by_name.get) == (truth.lower() if x_tail else truth)
    return 100 * right / len(task.test)


@pytest.mark.parametrize("name", ["moe_lora_pool", "lora_per_task"])
def test_routed_methods_one_image_at_a_time(name, tasks, routed):
    progress, method, folder = routed[name]
    told = {(selector, decision): accuracies for selector, decision, accuracies in progress.x_tail[-1]}
    assert list(told) == [
        *(("discriminant_classes", decision) for decision in DECISIONS),
        *(("gaussian", decision) for decision in ("per_image", "per_image_own")),
    ]
    for selector_name, decision in list(told)[:6]:
        selector = load_selector(folder / "after_3" / "selectors" / selector_name)
        for position in (0, 2):  # those that share a name
            expected = slowly(method, selector, tasks, tasks[position], 3, decision)
            assert told[selector_name, decision][position] == pytest.approx(expected), (selector_name, decision)
    selector = load_selector(folder / "after_3" / "selectors" / "discriminant_classes")
    soft = progress.selection[-1]["discriminant_classes"]["soft"]
    assert soft["accuracies"][0] == pytest.approx(slowly(method, selector, tasks, tasks[0], 3, "soft", x_tail=False))
    assert "soft" not in progress.selection[-1]["gaussian"] and soft["auroc"] is None


def test_some_tasks_not_learnt_yet(tasks, routed, tmp_path):
    """An image may be of none as long as some classes are of no learnt task; and a stopped run goes on to the same end."""
    progress, method = run(tmp_path, tasks, "moe_lora_pool", stop_after=2)
    told = {(selector, decision): accuracies for selector, decision, accuracies in progress.x_tail[-1]}
    selector = load_selector(tmp_path / "after_2" / "selectors" / "discriminant_classes")
    for decision in DECISIONS:
        for position in (1, 2):
            expected = slowly(method, selector, tasks, tasks[position], 2, decision)
            assert told["discriminant_classes", decision][position] == pytest.approx(expected), (decision, position)
    resumed, _ = run(tmp_path, tasks, "moe_lora_pool", resume=True)
    straight = routed["moe_lora_pool"][0]
    assert (resumed.x_tail, resumed.selection, resumed.matrix) == (
        straight.x_tail,
        straight.selection,
        straight.matrix,
    )
    assert run_result(5, resumed)["x_tail"] == run_result(5, straight)["x_tail"]
    with pytest.raises(ValueError, match=r"other settings: protocol was 'x_tail', is 'mtil'"):
        run(tmp_path, tasks, "moe_lora_pool", protocol="mtil", resume=True)


@pytest.mark.parametrize(
    ("name", "selectors"), [("moe_lora_pool", SELECTORS), ("moe_lora_pool", []), ("lora_per_task", [])]
)
def test_the_protocol_changes_no_other_number(name, selectors, tasks, routed, tmp_path):
    progress, _, _ = routed[name]
    mtil, _ = run(tmp_path, tasks, name, protocol="mtil", selectors=selectors)
    assert mtil.x_tail == [] and run_result(5, mtil)["x_tail"] == []
    assert mtil.selection == (progress.selection if selectors else [])
    assert (mtil.matrix, mtil.losses) == (progress.matrix, progress.losses)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("lora_fused", "lora_per_task"),
        pytest.param("moe_lora_fused", "moe_lora_warm", marks=pytest.mark.slow),
    ],
)
def test_methods_whose_classes_are_fused_have_the_routes_of_those_they_are_made_of(name, of, tasks, tmp_path):
    """Scores are for the test with the task known; selectors get features, and the same results as without."""
    fused, method = run(tmp_path / name, tasks[:2], name, selectors=["lda"])
    pixels = images_of(method, tasks[0])[0][:3]
    for route in (-1, 0, 1):
        features = method.routed_image_features(pixels, torch.full((3,), route))
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    plain, _ = run(tmp_path / "plain", tasks[:2], of, selectors=["lda"])
    assert fused.x_tail == plain.x_tail and fused.losses == plain.losses and fused.selection == plain.selection
    assert fused.matrix[0][1] == plain.matrix[0][1], "not learnt yet"


@pytest.mark.parametrize(
    ("name", "stays"), [("moe_lora_pool", True), pytest.param("moe_lora_merge", False, marks=pytest.mark.slow)]
)
def test_classes_are_encoded_once_by_routes_that_stay(name, stays, tasks, tmp_path, monkeypatch):
    encoded, encode = [], METHODS[name].encode_classes

    def counted(method, prompts, device):
        encoded.extend((method.model.current_task, of_class) for of_class in prompts)
        return encode(method, prompts, device)

    monkeypatch.setattr(METHODS[name], "encode_classes", counted)
    monkeypatch.setattr(Stream, "accuracy", lambda stream, method, task: 0.0)  # with the task known, always anew
    run(tmp_path, tasks[:2], name, selectors=["lda"])
    assert {route for route, _ in encoded} == {None, tasks[0].name, tasks[1].name}
    assert (len(encoded) == len(set(encoded))) is stays


@torch.no_grad()
def test_loras_as_routes(tasks, routed):
    """Each image by its task's LoRA, selectors by none, and what encoded before encodes afterwards."""
    _, method, _ = routed["lora_per_task"]
    pixels, _ = images_of(method, tasks[0])
    ids = torch.tensor([2, -1, 0, 2, 1, 0])
    one_by_one = []
    for image, task in zip(pixels, ids.tolist(), strict=False):
        method.set_task(None if task == -1 else tasks[task].name)
        one_by_one.append(method.image_features(image[None])[0])
    clip, processor = load_clip(mini_clip_path())
    plain = METHODS["zero_shot"](clip.eval(), processor, METHOD)
    source = SelectorSettings(["gaussian"]).source()
    for current in (tasks[1].name, None):
        method.set_task(current)
        before = method.image_features(pixels)
        routes = method.routed_image_features(pixels[:6], ids)
        torch.testing.assert_close(routes, torch.stack(one_by_one), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routes[1], plain.image_features(pixels[1:2])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(method.frozen_features(source, pixels), source(clip, pixels))
        torch.testing.assert_close(method.image_features(pixels), before, rtol=0, atol=0)


def test_a_selector_is_needed(tasks, tmp_path):
    with pytest.raises(ValueError, match=r"moe_lora_pool needs a selector to route by: `--selectors discriminant`"):
        run(tmp_path, tasks, "moe_lora_pool", selectors=[])
    twice = [tasks[0], dataclasses.replace(tasks[1], class_names=("four", "five", "four"))]
    with pytest.raises(ValueError, match=r"Classes named twice: \['four'\]"):
        run(tmp_path, twice, "moe_lora_pool")
    assert not list(tmp_path.iterdir()), "before anything trains"
    experiment = Experiment(DataSettings(suite="digits"), training=StreamSettings(protocol="x_tail"))
    experiment.check(["zero_shot", "icarl"], [0], tmp_path)
    with pytest.raises(ValueError, match="lora_per_task needs a selector"):
        experiment.check(["zero_shot", "lora_per_task"], [0], tmp_path)
    experiment.selection = SelectorSettings(["discriminant"])
    experiment.check(["zero_shot", "lora_per_task"], [0], tmp_path)
    with pytest.raises(ValueError, match=r"Unknown protocol \['xtail'\]; there are \['mtil', 'x_tail'\]"):
        StreamSettings(protocol="xtail")


def test_results_tables_and_page(tmp_path):
    progress = Progress(settings={}, matrix=[[80.0, 30.0], [70.0, 90.0]], selector_bytes={})
    progress.x_tail = [
        [["discriminant", "per_image", [60.0, 10.0]], ["discriminant", "soft_own", [61.0, 11.0]]],
        [["discriminant", "per_image", [50.0, 40.0]], ["discriminant", "soft_own", [51.0, 43.0]]],
    ]
    plain = Progress({}, [[1.0, 2.0]] * 2, x_tail=[[[None, None, [3.0, 4.0]]]] * 2)
    results = empty_results("mini", ["birds", "cars"], {})
    results["methods"] = {
        "moe_lora_pool": [run_result(0, progress)],
        "zero_shot": [run_result(0, plain)],
        "lora": [run_result(0, Progress({}, [[1.0, 2.0]] * 2))],
    }
    first = results["methods"]["moe_lora_pool"][0]["x_tail"][0]
    assert (first["transfer"], first["average"], first["last"]) == (10.0, 40.0, 45.0)
    assert first["matrix"] == [[60.0, 10.0], [50.0, 40.0]]
    rows = x_tail_rows(results)
    assert rows[1][:3] == ["moe_lora_pool", "discriminant", "one task, all classes"] and rows[1][3] == "10.00"
    assert rows[2][2] == "likely tasks mixed, their classes" and rows[2][-1] == "47.00"
    assert rows[3] == ["zero_shot", "nobody", "all classes", "4.00", "3.50", "3.50"] and len(rows) == 4
    console = Console(record=True, width=200)
    print_results(results, console)
    assert "likely tasks mixed, their classes" in console.export_text()
    write_results(tmp_path / "results.json", results)
    read = json.loads((tmp_path / "results.json").read_text())["methods"]["zero_shot"][0]["x_tail"]
    assert read[0]["selector"] is None and read[0]["last"] == 3.5
    assert "X-TAIL" in write_report(results, tmp_path)[-1].read_text()
    assert (tmp_path / "figures" / "x_tail.png").stat().st_size > 5000
    results["methods"] = {"lora": results["methods"]["lora"]}
    assert x_tail_rows(results) == [] and "X-TAIL" not in write_report(results, tmp_path)[-1].read_text()
