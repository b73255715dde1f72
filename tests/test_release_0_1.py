"""Adapters of the first release load to the outputs that it gave."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_clip
from peft import PeftModel
from safetensors.torch import load_file
from wemoe_clip import small_clip

import peft_moe_merge  # noqa: F401  (registers the methods)

FOLDER = Path(__file__).parent / "release_0_1"
IDS = torch.tensor([0, 1, -1, 1])


def test_all_are_here():
    assert len(list(FOLDER.glob("*/outputs.safetensors"))) == 10


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("m*/")), ids=lambda folder: folder.name)
def test_mixtures(folder):
    then, batch = load_file(folder / "outputs.safetensors"), tiny_batch()
    model = PeftModel.from_pretrained(tiny_clip(), folder).eval()
    with torch.no_grad():
        now = {
            "current": model(**batch).logits_per_image,
            "mixed": model(**batch, task_ids=IDS).logits_per_image,
            "image": model.get_image_features(batch["pixel_values"]).pooler_output,
        }
    for name, value in now.items():
        torch.testing.assert_close(value, then[name], rtol=1e-5, atol=1e-5)
    assert all(frozen == [1] for frozen in model.frozen_experts().values())
    assert model.peft_config["default"].current_task == ("b" if folder.name.endswith(("sample", "linear")) else "a")


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("s*/")), ids=lambda folder: folder.name)
def test_selectors(folder):
    then, batch = load_file(folder / "outputs.safetensors"), tiny_batch()
    model = PeftModel.from_pretrained(tiny_clip(), folder).eval()
    with torch.no_grad():
        chosen, scores = model.select_tasks(batch["pixel_values"])
        torch.testing.assert_close(model(**batch).logits_per_image, then["current"], rtol=1e-5, atol=1e-5)
    assert chosen.tolist() == then["chosen"].tolist()
    torch.testing.assert_close(scores, then["scores"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", sorted(FOLDER.glob("w*/")), ids=lambda folder: folder.name)
def test_wemoe(folder):
    then = load_file(folder / "outputs.safetensors")
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PeftModel.from_pretrained(small_clip(), folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.get_image_features(pixel_values=pixels).pooler_output, then["image"], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("name", ["mixture_sample", "mixture_token", "wemoe_rank"])
def test_saved_anew_they_stay_the_same(name, tmp_path):
    base = small_clip if name.startswith("w") else tiny_clip
    PeftModel.from_pretrained(base(), FOLDER / name).save_pretrained(tmp_path / "new")
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = (
            PeftModel.from_pretrained(base(), which).eval().get_image_features(pixel_values=pixels)
            for which in (FOLDER / name, tmp_path / "new")
        )
    assert torch.equal(old.pooler_output, new.pooler_output)


@pytest.mark.parametrize(
    "old",
    ["callback", "classifier", "routing", "static_merges", "tuners.wemoe.zero_shot", "tuners.moe_lora_merge.tasks"],
)
def test_module_paths_of_then_are_found_and_warn(old):
    sys.modules.pop(f"peft_moe_merge.{old}", None)
    with pytest.warns(FutureWarning, match=f"`peft_moe_merge.{old}` is now"):
        module = importlib.import_module(f"peft_moe_merge.{old}")
    assert module is sys.modules[module.__name__]
