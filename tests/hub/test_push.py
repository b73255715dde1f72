"""A finished stream to the Hub: the card says what was measured, and its own instructions work elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hub.loopback import OTHER_TOKEN, OWNER_TOKEN, LoopbackHub
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge import ContinualClassifier, MoELoraMergeConfig, TaskClasses
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS
from peft_moe_merge.mtil.push import prepare_push, push_adapter
from peft_moe_merge.mtil.report.card import PUBLISHED, model_card, published
from peft_moe_merge.mtil.results import empty_results, run_result
from peft_moe_merge.selection import DiscriminantSelector, PatchTokens

TASKS = {"pets": ("cat", "dog"), "shapes": ("circle", "square")}
EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"


@pytest.fixture
def hub_here(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch):
    """Let this process use the loopback Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    close_session()
    yield hub
    close_session()


def results(model: str | None = None) -> dict:
    told = empty_results("mini", list(TASKS), {"model": model, "steps": 3, "output_dir": "/home/me/runs"})
    for name, shift in (("zero_shot", 0), ("moe_adapters", 1), ("moe_lora_merge", 2)):
        matrices = [[10, 10], [10, 10]], [[60 + shift, 50], [58.126, 70 + shift]]
        told["methods"][name] = [
            run_result(seed, Progress(settings={}, matrix=matrix, trainable_parameters=1234))
            for seed, matrix in enumerate(matrices)
        ]
    return told


def task(name: str) -> Task:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(TASKS[name]))})
    rows = Dataset.from_dict({"image": [Image.new("RGB", (8, 8))], "label": [0]}, features=features)
    return Task(name, TASKS[name], ("a picture of a {}.",), rows, rows)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=list(TASKS))
    model = get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config)
    randomize(model)
    model.save_pretrained(tmp_path / "after_2")
    (tmp_path / "after_2" / "progress.json").write_text("{}")
    return tmp_path / "after_2"


def test_the_card_tells_the_numbers_of_the_run() -> None:
    card = ModelCard(
        str(model_card(results("openai/clip-vit-base-patch16"), "me/adapter", "moe_lora_merge", seed=1))
    )  # parsed anew
    data = card.data
    assert {"peft", "moe", "continual-learning"} <= set(data.tags)
    assert (data.library_name, data.license, data.base_model) == ("peft", "apache-2.0", "openai/clip-vit-base-patch16")
    told = {(one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results}
    assert told == {
        ("stream", "transfer"): 50.0,
        ("stream", "average"): 60.53,  # (62 + 58.126 + 50 + 72) / 4
        ("stream", "last"): 65.06,
        ("stream", "forgetting"): 3.87,
        ("pets", "accuracy"): 58.13,
        ("shapes", "accuracy"): 72.0,
    }
    assert "| pets | 62.0 | 50.0 | 56.0 |" in card.text and "| steps | 3 |" in card.text
    assert "/home/me" not in str(card), "where the run was stored is nobody's business"
    assert 'CLIPModel.from_pretrained("openai/clip-vit-base-patch16")' in card.text


def test_a_clip_from_a_folder_is_not_named(tmp_path: Path) -> None:
    card = model_card(results(str(tmp_path)), "me/adapter", "moe_lora_merge", seed=0, license="mit")
    assert card.data.base_model is None and card.data.license == "mit"
    assert str(tmp_path) not in str(card)


def test_no_adapter_no_card() -> None:
    told = results()
    del told["methods"]["moe_lora_merge"]
    with pytest.raises(
        ValueError, match=r"seed 0 in these results, .* \[\] and the methods \['zero_shot', 'moe_adapters'\]"
    ):
        model_card(told, "me/adapter", "moe_lora_merge", seed=0)
    with pytest.raises(ValueError, match=r"with seed 7 .* its seeds \[0, 1\]"):
        model_card(results(), "me/adapter", "moe_lora_merge", seed=7)


def test_pushing_what_cannot_be_pushed_fails_at_once(hub_here, monkeypatch) -> None:
    with pytest.raises(PermissionError, match="'owner/run' needs a token of the Hub: `hf auth login`"):
        prepare_push("owner/run")
    for token, message in (
        (OTHER_TOKEN, "is that of 'other', who can't push to 'owner/run': its owner must be 'other'"),
        ("hf_no", "does not let this token push to 'owner/run': Invalid user token"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(PermissionError, match=message):
            prepare_push("owner/run")
    assert not hub_here.repos
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    assert prepare_push("run") == prepare_push("owner/run") == "owner/run"
    assert ("model", "owner/run") in hub_here.repos


def test_what_we_recommend_is_published_first() -> None:
    assert next(iter(PUBLISHED)) == "moe_lora_fused" and PUBLISHED.keys() <= METHODS.keys()
    assert published(["zero_shot", "moe_lora_merge", "moe_lora_pool"]) == "moe_lora_pool"
    assert published(["zero_shot", "lora_per_task"]) is None


def attach_gaussians(checkpoint: Path) -> None:
    """Let the adapter have what one of `moe_lora_fused` has."""
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(mini_clip_path()), checkpoint)
    selector = DiscriminantSelector(PatchTokens(1), means="classes", shared=(1.0,))
    generator = torch.Generator().manual_seed(0)
    for name in TASKS:
        labels = torch.arange(60) % 2
        features = torch.randn(60, 2 * model.config.vision_config.hidden_size, generator=generator)
        selector.fit(name, [(features + labels[:, None], labels)])
    model.attach_selector(selector)
    model.save_pretrained(checkpoint)


@pytest.mark.parametrize("method", ["moe_lora_merge", "moe_lora_fused"])
def test_what_is_pushed_works_as_its_card_says(method, hub_here, monkeypatch, checkpoint, tmp_path) -> None:
    monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
    processor = CLIPProcessor.from_pretrained(mini_clip_path())
    told = results()
    told["methods"][method] = told["methods"]["moe_lora_merge"]
    if fused := method == "moe_lora_fused":
        attach_gaussians(checkpoint)
    repo_id = prepare_push("run")
    push_adapter(
        repo_id, checkpoint, [task(name) for name in TASKS], processor, model_card(told, repo_id, method, seed=1)
    )
    repo = hub_here.repos["model", "owner/run"]
    files = repo.commits[repo.branches["main"]]
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "classifier.json"} <= set(files)
    assert "progress.json" not in files
    for file in files.values():
        assert mini_clip_path().encode() not in (hub_here.folder / file.sha256).read_bytes(), "a path of this machine"

    card = (hub_here.folder / files["README.md"].sha256).read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    Image.new("RGB", (40, 30), "red").save(tmp_path / "picture.jpg")
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        env=hub_here.environment(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    clip = CLIPModel.from_pretrained(mini_clip_path())
    classes = {name: TaskClasses(names, ("a picture of a {}.",)) for name, names in TASKS.items()}
    here = ContinualClassifier(PeftModel.from_pretrained(clip, checkpoint), processor, classes, fuse=fused)
    assert fused == ("fuse=True" in snippet) == ("selector.safetensors" in files)
    assert done.stdout.strip() == here(tmp_path / "picture.jpg", task="pets").label


@pytest.mark.slow
@pytest.mark.parametrize("method", ["moe_lora_merge", "moe_lora_fused"])
def test_the_example_pushes_its_adapter(method: str, hub: LoopbackHub, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--suite", "mini", "--tasks", "shapes", "colors", "--steps", "30"]
    command += ["--methods", method, "--num_experts", "4", "--r", "4", "--batch_size", "8", "--lr", "5e-3"]
    command += ["--push_to_hub", "owner/run"]

    def run(folder: str, token: str | None) -> subprocess.CompletedProcess:
        environment = hub.environment(tmp_path / "home", token)
        whole = [*command, "--output_dir", str(tmp_path / folder)]
        return subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=300)

    refused = run("without", None)
    assert refused.returncode != 0 and "needs a token of the Hub" in refused.stderr
    assert not (tmp_path / "without").exists(), "nothing was trained"
    pushed = run("with", OWNER_TOKEN)
    assert pushed.returncode == 0, pushed.stderr
    assert f"adapter: {hub.url}/owner/run/commit/" in pushed.stdout
    repo = hub.repos["model", "owner/run"]
    files = repo.commits[repo.branches["main"]]
    weights = (tmp_path / "with" / method / "seed_42" / "after_2" / "adapter_model.safetensors").read_bytes()
    assert (hub.folder / files["adapter_model.safetensors"].sha256).read_bytes() == weights

    # loaded by name in a process of its own, the classifier is as accurate as the run says
    code = f"""
from peft_moe_merge import ContinualClassifier
from peft_moe_merge.mtil.data.mini import load_task, mini_clip_path
from transformers import CLIPModel
classifier = ContinualClassifier.from_pretrained("owner/run", clip=CLIPModel.from_pretrained(mini_clip_path()),
    fuse={method == "moe_lora_fused"})
for task in ("shapes", "colors"):
    test = load_task(task, "test")
    names = test.features["label"].names
    answers = classifier(list(test["image"]), task=task)
    print(100 * sum(names[row] == one.label for row, one in zip(test["label"], answers)) / len(answers))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=hub.environment(tmp_path / "other_home"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "with" / "results.json").read_text())["methods"][method][0]["matrix"][-1]
    assert [float(line) for line in done.stdout.split()] == pytest.approx(told, abs=0.5)
