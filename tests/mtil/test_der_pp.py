"""DER++: the reservoir, and the loss term by term."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy

import pytest
import torch
import torch.nn.functional as F
from small_methods import SETTINGS, disturb, logits_of, make, some_batch, tasks

from peft_moe_merge.mtil.methods import MethodSettings
from peft_moe_merge.mtil.methods.kept_images import in_bytes, normalized
from peft_moe_merge.mtil.methods.reservoir import reservoir


def settings(**changed):
    return MethodSettings(**{**vars(SETTINGS), **changed})


def test_images_in_bytes(make):
    processor = make("der_pp").processor.image_processor
    pixels = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(in_bytes(normalized(pixels, processor), processor), pixels)
    torch.testing.assert_close(
        normalized(pixels, processor), processor(list(pixels), return_tensors="pt")["pixel_values"]
    )


def test_loss_term_by_term(make, tasks):
    alpha, beta = 0.3, 0.7
    method = make("der_pp", settings(der_alpha=alpha, der_beta=beta, extra_batch_size=9, exemplars=10))
    processor = method.processor.image_processor
    tasks = [tasks[0], tasks[1]]  # of 4 and of 3 classes
    batches = [some_batch(classes=4, seed=1), some_batch(classes=3, seed=2)]
    prompts = [task.prompts(task.templates[0]) for task in tasks]
    method.begin_task(tasks[0])
    first = method.loss(method.model, batches[0])
    own = logits_of(method, method.model, batches[0]["pixel_values"], prompts[0])
    entropy = F.cross_entropy(own, batches[0]["labels"], label_smoothing=0.2)
    assert first.item() == pytest.approx(entropy.item(), rel=1e-5), "nothing to replay yet"
    assert torch.equal(method.pixels_N3HW, in_bytes(batches[0]["pixel_values"], processor))
    torch.testing.assert_close(method.logits_NK, own, atol=1e-5, rtol=1e-5)
    method.end_task()

    method.begin_task(tasks[1])
    disturb(method.model)
    method.loss(method.model, batches[1])
    kept = {name: tensor.clone() for name, tensor in vars(method).items() if isinstance(tensor, torch.Tensor)}
    assert sorted(set(kept["task_N"].tolist())) == [0, 1] and len(kept["task_N"]) == 10

    disturb(method.model, 4)
    draws = copy.deepcopy(method.generator)
    loss = method.loss(method.model, batches[1])
    drawn = [torch.randperm(10, generator=draws)[:9].tolist() for _ in range(2)]
    own = logits_of(method, method.model, batches[1]["pixel_values"], prompts[1])
    expected = F.cross_entropy(own, batches[1]["labels"], label_smoothing=0.2).item()
    for row in drawn[0]:
        of_task = prompts[kept["task_N"][row]]
        pixels = normalized(kept["pixels_N3HW"][row : row + 1], processor)
        now = logits_of(method, method.model, pixels, of_task)[0].tolist()
        then = kept["logits_NK"][row].tolist()
        squares = [(a - b) ** 2 for a, b in zip(now, then, strict=False)]
        expected += alpha * sum(squares) / len(of_task) / 9
    for row in drawn[1]:
        pixels = normalized(kept["pixels_N3HW"][row : row + 1], processor)
        chances = logits_of(method, method.model, pixels, prompts[kept["task_N"][row]])[0].double().softmax(0)
        expected += beta * -chances[kept["labels_N"][row]].log().item() / 9
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(
        weight.grad is not None for name, weight in method.model.named_parameters() if "logit_scale" not in name
    )


def test_every_image_has_the_same_chance_to_be_kept():
    """24 images in three batches, 6 of which can stay: each is kept in a quarter of many reservoirs."""
    counts, runs = torch.zeros(24), 2000
    for seed in range(runs):
        generator, kept = torch.Generator().manual_seed(seed), []
        for first in (0, 5, 16):
            new = list(range(first, {0: 5, 5: 16, 16: 24}[first]))
            kept = [(kept + new)[row] for row in reservoir(len(kept), len(new), 6, first, generator)]
        assert len(set(kept)) == 6
        counts[kept] += 1
    spread = (runs * 0.25 * 0.75) ** 0.5
    assert ((counts - runs * 0.25).abs() < 4 * spread).all()
    assert reservoir(2, 3, 9, 2, torch.Generator()) == [0, 1, 2, 3, 4], "while there is room all stay"


@pytest.mark.parametrize("changed", [{"der_alpha": -1.0}, {"der_beta": -1.0}])
def test_settings_are_checked(changed):
    with pytest.raises(ValueError, match=f"`{next(iter(changed))}` must"):
        MethodSettings(**changed)
