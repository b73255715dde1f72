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
from peft import get_peft_model
from PIL import Image
from transformers import CLIPModel, TrainingArguments, default_data_collator

from peft_moe_merge import MoELoraMergeConfig
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
