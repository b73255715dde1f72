"""How a method scores images for classes, whatever precision its towers run in."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
from small_methods import make, some_batch, tasks

from peft_moe_merge.mtil.data.label_space import LabelSpace

CPU = torch.device("cpu")


@torch.no_grad()
@pytest.mark.parametrize("name", ["zero_shot", "rail", "slda", "lora_fused"])
def test_under_autocast_the_towers_alone_lose_precision(name, make, tasks, monkeypatch):
    method, pixels = make(name), some_batch(40)["pixel_values"]
    if name != "zero_shot":
        method.begin_task(tasks[0]) if method.trains else method.learn(tasks[0])
        method.end_task()
    method.prepare_evaluation(tasks[0])
    method.model.eval()
    classes = LabelSpace.of_task(tasks[0])
    with torch.autocast("cpu", torch.bfloat16):
        features, texts = method.image_features(pixels), method.encode_classes(classes.prompts, CPU)
        found = method.scorer(classes, CPU)(pixels)
    monkeypatch.setattr(method, "image_features", lambda pixel_values: features)
    monkeypatch.setattr(method, "encode_classes", lambda prompts, device: texts)
    expected = method.scorer(classes, CPU)(pixels)
    assert features.dtype == texts.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
