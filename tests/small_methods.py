"""Three small tasks, methods that learn them from a small CLIP that knows nothing, and what tests of them share."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

SETTINGS = MethodSettings(
    num_experts=6,
    r=4,
    top_k=2,
    merge_every=2,
    lora_r=4,
    full_lr=1e-3,
    extra_batch_size=8,
    average_every=2,
    exemplars=20,
    rail_features=96,
    sema_threshold=-1e9,  # everything is new
)


@pytest.fixture(scope="module")
def tasks():
    return [
        replace(task, train=task.train.select(range(96)), test=task.test.select(range(48)))
        for task in load_digit_tasks()
    ]


@pytest.fixture(scope="module")
def make(tasks):
    clip, processor = small_clip([prompt for task in tasks for prompt in task.prompts(task.templates[0])])

    def method(name, settings=SETTINGS):
        return METHODS[name](copy.deepcopy(clip), processor, settings)

    return method


@pytest.fixture
def run(tasks, make, tmp_path):
    def stream(name, *, folder=None, steps=3, lr=3e-3, settings=SETTINGS, count=3, **kwargs):
        training = StreamSettings(steps=steps, batch_size=16, lr=[lr])
        return run_stream(
            tasks[:count],
            lambda: make(name, settings),
            training,
            tmp_path / (folder or name),
            Accelerator(cpu=True),
            seed=7,
            **kwargs,
        )

    return stream


def some_batch(size=6, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "labels": torch.randint(classes, (size,), generator=generator),
    }


def disturb(model, seed=3):
    """Move all weights, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "logit_scale" not in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def logits_of(method, model, pixels, texts):
    with torch.no_grad():
        return model(pixel_values=pixels, **method.tokenize(texts)).logits_per_image


def reference_distillation(student, teacher, temperature=2.0):
    """Row by row, term by term."""
    total = 0.0
    for student_row, teacher_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (
            [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row]
            for row in (teacher_row, student_row)
        )
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)
