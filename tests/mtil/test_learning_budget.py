"""LoRA+, rsLoRA and the schedule: what the optimizer and the model get of them."""

import pytest
import torch
from accelerate import Accelerator

from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings

SECOND = {"lora": ".lora_B.", "lora_per_task": ".lora_B.", "moe_lora_pool": ".up_weight."}


@pytest.fixture(scope="module")
def tasks():
    return load_suite("digits")[:1]


def started(name, tasks, **settings):
    torch.manual_seed(0)
    prompts = [f"a photo of a {name}." for name in tasks[0].class_names]
    method = METHODS[name](*small_clip(prompts), MethodSettings(lora_r=4, pool_r=4, **settings))
    method.begin_task(tasks[0])
    return method


@pytest.mark.parametrize("name", list(SECOND))
def test_second_matrices_learn_at_a_rate_of_their_own(name, tasks):
    method = started(name, tasks, loraplus_ratio=8.0)
    rates = {id(p): group["lr"] for group in method.parameter_groups(1e-3) for p in group["params"]}
    assert set(rates) == {id(p) for p in method.trainable_parameters()}, "each once, and no other"
    for parameter_name, parameter in method.model.named_parameters():
        if id(parameter) in rates:
            expected = 8e-3 if SECOND[name] in parameter_name or ".up_bias." in parameter_name else 1e-3
            assert rates[id(parameter)] == pytest.approx(expected), parameter_name


@pytest.mark.parametrize("name", list(SECOND))
def test_rslora_scales_by_the_root_of_the_rank(name, tasks):
    updates = []
    for rslora in (False, True):
        method = started(name, tasks, use_rslora=rslora)
        pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        parameters = dict(method.model.named_parameters())
        size = method.model.base_model.model.config.vision_config.image_size
        pixels = torch.nn.functional.interpolate(pixels, size)
        plain = method.image_features(pixels)
        with torch.no_grad():
            torch.manual_seed(2)
            for parameter_name, parameter in parameters.items():
                if SECOND[name] in parameter_name:  # so small that features change in proportion
                    parameter.copy_(1e-5 * torch.randn(parameter.shape))
        updates.append(method.image_features(pixels) - plain)
    assert updates[0].abs().max() > 0
    ratio = (updates[0] * updates[1]).sum() / updates[0].square().sum()
    assert ratio.item() == pytest.approx(2.0, rel=0.05), "4 / sqrt(4) against 4 / 4"


def test_the_schedule_is_the_one_that_was_chosen(tasks):
    rates = {}
    for schedule in ("cosine", "linear", "constant_with_warmup"):
        training = StreamSettings(steps=8, batch_size=4, lr=[1e-3], schedule=schedule, warmup_steps=2)
        stream = Stream(tasks, training, Accelerator(cpu=True))
        method = started("lora", tasks)
        seen = rates.setdefault(schedule, [])
        method.after_step = lambda optimizer, seen=seen: seen.append(optimizer.param_groups[0]["lr"])
        stream.train(method, 0, 0, Progress({}))
    peak = METHODS["lora"].settings_class().lora_lr
    linear = [peak * (8 - step) / 6 for step in range(3, 9)]
    assert rates["linear"][2:] == pytest.approx(linear)
    assert rates["constant_with_warmup"] == pytest.approx([peak / 2, *[peak] * 7])
    assert rates["cosine"][4] == pytest.approx(peak / 2)


def test_schedules_and_ratios_that_there_are_not_are_refused():
    with pytest.raises(ValueError, match=r"Unknown schedule \['cosinus'\]; there are \['cosine', 'linear'"):
        StreamSettings(schedule="cosinus")
    with pytest.raises(ValueError, match="`loraplus_ratio` must be positive, got 0"):
        MethodSettings(loraplus_ratio=0)
