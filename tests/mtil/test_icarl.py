"""iCaRL: which images are kept, and what replaying them adds to the loss."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_methods import disturb, logits_of, make, reference_distillation, run, some_batch, tasks

from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.herding import herd
from peft_moe_merge.mtil.methods.kept_images import normalized


def test_herding_against_trying_all():
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(12, 5, generator=generator, dtype=torch.float64), dim=-1)
    mean, slow = features.mean(0), []
    for _ in range(7):
        candidates = [row for row in range(12) if row not in slow]
        distances = [(features[[*slow, row]].mean(0) - mean).norm().item() for row in candidates]
        slow.append(candidates[int(np.argmin(distances))])
    assert herd(features, 7) == slow
    assert herd(features, 3) == slow[:3], "cut the list to keep fewer"
    assert sorted(herd(features, 99)) == list(range(12)), "all, and none twice"
    equal = torch.ones(4, 2)
    assert sorted(herd(equal, 4)) == [0, 1, 2, 3]


def test_icarl_keeps_a_fixed_number_and_replays_them(make, tasks):
    method = make("icarl")
    batch = some_batch(classes=3)
    method.begin_task(tasks[0])
    assert method.loss(method.model, batch).item() == pytest.approx(
        METHODS["finetune"].loss(method, method.model, batch).item()
    )
    disturb(method.model, 1)
    features = {}
    for label in range(4):
        rows = [row for row, own in enumerate(tasks[0].train["label"]) if own == label]
        images = [image.convert("RGB") for image in tasks[0].train[rows]["image"]]
        pixels = method.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features[label] = (pixels, method.image_features(pixels))
    method.end_task()
    assert method.classes_N.tolist() == sorted([0, 1, 2, 3] * 5)
    assert method.pixels_N3HW.dtype == torch.uint8
    for label, (pixels, of_class) in features.items():
        own = normalized(method.pixels_N3HW[method.classes_N == label], method.processor.image_processor)
        torch.testing.assert_close(own, pixels[herd(of_class, 5)])

    first = method.pixels_N3HW
    before = copy.deepcopy(method.model)
    method.begin_task(tasks[1])
    disturb(method.model, 2)
    draws = copy.deepcopy(method.generator)
    loss = method.loss(method.model, batch)
    rows = torch.randperm(20, generator=draws)[:8]
    replayed = normalized(method.pixels_N3HW[rows], method.processor.image_processor)
    labels = method.classes_N[rows]
    old, new = (task.prompts(task.templates[0]) for task in tasks[:2])
    everything = torch.cat([batch["pixel_values"], replayed])
    student, teacher = (logits_of(method, model, everything, old) for model in (method.model, before))
    own = logits_of(method, method.model, batch["pixel_values"], new)
    entropies = torch.cat(
        [
            F.cross_entropy(own, batch["labels"], label_smoothing=0.2, reduction="none"),
            F.cross_entropy(student[len(own) :], labels, label_smoothing=0.2, reduction="none"),
        ]
    )
    expected = entropies.mean() + reference_distillation(student, teacher)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    method.end_task()
    assert method.classes_N.tolist() == sorted([*range(7)] * 2), "20 over 7 classes: two of each"
    assert torch.equal(method.pixels_N3HW[:8], first[[0, 1, 5, 6, 10, 11, 15, 16]]), "the first chosen stay"


def test_icarl_needs_room_for_every_class(run):
    with pytest.raises(ValueError, match="exemplars=5 is less than .* 7 classes up to task 'digits_4_to_6'"):
        run("icarl", settings=MethodSettings(exemplars=5), steps=1)


def test_what_is_kept_is_counted(run, tmp_path):
    """Exemplars are part of what a method stores."""
    bytes_of = {name: run(name, count=1).stored_bytes for name in ("finetune", "icarl")}
    assert bytes_of["icarl"] - bytes_of["finetune"] > 20 * 3 * 32 * 32
    progress = json.loads((tmp_path / "icarl" / "after_1" / "progress.json").read_text())
    assert progress["settings"]["exemplars"] == 20
