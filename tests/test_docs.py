"""The snippets of the documentation run as they stand."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_batch, tiny_clip
from datasets import Dataset
from hub.loopback import OWNER_TOKEN, LoopbackHub
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from transformers import CLIPModel, TrainingArguments, default_data_collator
from wemoe_clip import TASKS, finetune, small_clip

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.model_merging.static import STATIC_MERGES
from peft_moe_merge.mtil.data.mini import mini_clip_path

DOCS = Path(__file__).parents[1] / "docs"
README = Path(__file__).parents[1] / "README.md"


def snippets(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    batch = tiny_batch(3)
    images = Dataset.from_dict(
        {"pixel_values": batch["pixel_values"].tolist(), "input_ids": batch["input_ids"].tolist()}
    )
    names: dict = {
        "arguments": TrainingArguments(str(tmp_path / "trainer"), max_steps=2, use_cpu=True, report_to=[]),
        "aircraft": images.with_format("torch"),
        "cifar100": images.with_format("torch"),
        "collate": lambda rows: {**default_data_collator(rows), "return_loss": True},
        "batch": batch,
        "ids": torch.tensor([1, -1, 0]),
    }
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    exec(code.replace("openai/clip-vit-base-patch16", str(tmp_path / "clip")), names)
    model = names["model"].eval()
    assert model.current_task == "cifar100" and model.peft_config["default"].tasks == ["aircraft", "cifar100"]
    logits, plain = model(**batch, task_ids=names["ids"]).logits_per_image, tiny_clip()(**batch).logits_per_image
    torch.testing.assert_close(logits, names["out"].logits_per_image)
    assert torch.equal(logits[1], plain[1])
    assert not torch.equal(logits[0], plain[0]) and not torch.equal(logits[2], plain[2]), "both tasks were learnt"


def test_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=4, r=4, tasks=["pets", "shapes"])
    get_peft_model(CLIPModel.from_pretrained(mini_clip_path()), config).save_pretrained(tmp_path / "my_adapter")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "tom.jpg")
    Image.fromarray(pixels[1]).save(tmp_path / "ball.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippets("inference.md"), names)
    assert [one.task for one in names["several"]] == ["pets", "shapes", None]
    assert names["logits"].shape == (5, 3)


def test_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippets("stream.md"), names)
    progress = names["progress"]
    assert len(progress.matrix) == 2 and progress.settings["few_shot"] == 8
    assert (tmp_path / "runs/few/moe_lora_merge/seed_0/after_2/progress.json").is_file()


def test_start_and_choose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippets("start.md"), names)
    told = re.findall(r"(\w+): (\d+)% by plain CLIP, (\d+)% now", capsys.readouterr().out)
    assert [task for task, *_ in told] == ["digits", "flowers"]
    assert all(int(learnt) >= int(plain) + 5 for _, plain, learnt in told)
    model, again = names["model"].eval(), names["again"].eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 1])
    expected = model.get_image_features(pixels, task_ids=ids).pooler_output
    torch.testing.assert_close(again.get_image_features(pixels, task_ids=ids).pooler_output, expected)
    exec(snippets("choose.md"), names)
    assert names["chosen"].task == "flowers" and names["asked"].task is None


def test_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for task, split, name in itertools.product(("birds", "tools"), ("train", "test"), ("snow_goose", "robin")):
        folder = tmp_path / "my_images" / task / split / name
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03}.jpg")
    monkeypatch.chdir(tmp_path)
    code = snippets("folder.md").replace("openai/clip-vit-base-patch16", mini_clip_path())
    names: dict = {}
    exec(code.replace("steps=1000, batch_size=64", "steps=2, batch_size=4"), names)
    assert len(names["progress"].matrix[-1]) == 2
    assert names["model"].current_task == "birds" and names["model"].peft_config["default"].tasks == ["birds", "tools"]


def test_tuner() -> None:
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig.pool(tasks=["pets"]))
    names: dict = {"torch": torch, "model": model}
    exec(snippets("tuner.md"), names)
    groups = {group["lr"]: group["params"] for group in names["optimizer"].param_groups}
    assert groups.keys() == {1e-3, 4e-3}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {id(parameter) for group in groups.values() for parameter in group} == trained


def test_selection(tmp_path: Path) -> None:
    """Two tasks, of bright and of dark images; a threshold is the quantile of 20 scores that were held out."""
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig.pool(tasks=["bright", "dark"]))
    generator = torch.Generator().manual_seed(0)
    pixels = {
        task: torch.randn(220, 3, 16, 16, generator=generator) + shift for task, shift in (("bright", 2), ("dark", -2))
    }
    labels = torch.arange(220) % 2
    names: dict = {
        "model": model,
        "loaders": {task: [{"pixel_values": images[:200], "labels": labels[:200]}] for task, images in pixels.items()},
        "batch": tiny_batch(3),
        "pixel_values": torch.cat([images[200:] for images in pixels.values()]),
        "folder": tmp_path / "adapter",
    }
    with torch.no_grad():
        exec(snippets("selection.md"), names)
    right = names["ids"] == torch.arange(2).repeat_interleave(20)
    assert right.float().mean() > 0.8 and names["scores"].shape == (40, 2)
    again = PeftModel.from_pretrained(tiny_clip(), names["folder"]).eval()
    assert torch.equal(again.select_tasks(names["pixel_values"])[0], names["ids"])


def test_wemoe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, generator = small_clip(), torch.Generator().manual_seed(0)
    cars, dtd = finetune(base, 1), finetune(base, 2)
    dtd.save_pretrained(tmp_path / "clip-dtd")
    lora = get_peft_model(small_clip(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    names: dict = {
        "PeftModel": PeftModel,
        "small_clip": small_clip,
        "base_clip": base,
        "clip_cars": cars,
        "clip_dtd": dtd,
        "loader": DataLoader(
            TensorDataset(torch.randn(8, 3, 16, 16, generator=generator)), batch_size=4, shuffle=True
        ),
        "heads": {task: normalize(torch.randn(5, 16, generator=generator), dim=-1) for task in TASKS},
        "fresh_clip": small_clip(),
    }
    monkeypatch.chdir(tmp_path)
    code = snippets("wemoe.md")
    short = {"me/clip-dtd": "clip-dtd", "folder/of/a/lora": "lora", "steps=1000": "steps=2"}
    fresh = {"merge_static(base_clip": "merge_static(small_clip()"}  # in a process of its own the base has no adapter
    for written, here in {**short, **fresh}.items():
        assert written in code
        code = code.replace(written, here)
    try:
        exec(code, names)
        assert names["model"].peft_config["default"].peft_type == "WEMOE"
        by_hand = names["merge_static"](small_clip(), {"cars": cars, "dtd": dtd}, "first_task", scaling=1.0)
    finally:
        STATIC_MERGES.pop("first_task", None)
    for (name, weight), expected in zip(by_hand.named_parameters(), cars.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, msg=name)


@pytest.mark.slow  # the same calls are in tests/hub/test_adapters.py
def test_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    tiny_clip().save_pretrained(tmp_path / "clip")
    hub.add_repo("model", "owner/clip", {path.name: path for path in (tmp_path / "clip").iterdir()})
    code = (
        snippets("hub.md").replace('"user/', '"owner/')
        + '\nassert model.peft_config["default"].tasks == ["pets", "shapes"]'
    )
    environment = hub.environment(tmp_path / "home", OWNER_TOKEN)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
