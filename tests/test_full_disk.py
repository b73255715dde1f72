"""A disk that fills up while an adapter is written: an error, and nothing half-written. The limit is the kernel's own."""

from pathlib import Path

import pytest
import torch
from conftest import files_up_to, randomize, tiny_batch, tiny_clip
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError

from peft_moe_merge import MoELoraMergeConfig


def adapter(seed: int) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=6, r=4, tasks=["a", "b"]))
    randomize(model, seed)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_batch()).logits_per_image


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_adapter_that_was_there_stays(tmp_path: Path) -> None:
    first, second = adapter(1), adapter(2)
    first.save_pretrained(tmp_path)
    second.set_task("b")
    before = contents(tmp_path)
    with files_up_to(20_000), pytest.raises(SafetensorError, match="File too large"):
        second.save_pretrained(tmp_path)  # the card is written, the weights are not
    assert contents(tmp_path).keys() == before.keys()
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path)
    assert torch.equal(logits(loaded), logits(first))


def test_the_config_that_was_there_stays(tmp_path: Path) -> None:
    config = MoELoraMergeConfig(tasks=["a"])
    config.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with files_up_to(100), pytest.raises(OSError, match="File too large"):
        MoELoraMergeConfig(tasks=["a", "b"]).save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert MoELoraMergeConfig.from_pretrained(tmp_path).tasks == ["a"]
