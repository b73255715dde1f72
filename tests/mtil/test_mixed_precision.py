"""A stream in bfloat16: every task is trained so, and classes are told apart in float32 all the same."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_methods import make, some_batch, tasks
from transformers import CLIPModel

from peft_moe_merge.mtil.data.label_space import LabelSpace
from peft_moe_merge.mtil.model_merging.finetune import finetune
from peft_moe_merge.mtil.model_merging.images import load_images
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

CPU = torch.device("cpu")


@pytest.fixture
def bf16():
    """An accelerator; what other tests have set up is forgotten, and so is this."""
    AcceleratorState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()


def test_every_task_is_trained_in_it_stopped_or_not(make, tasks, tmp_path, bf16):
    seen = {}

    def stream(folder, **how):
        def build():
            method = make("moe_lora_pool")
            projection = method.model.visual_projection
            kinds = seen.setdefault(folder, [])
            projection.register_forward_hook(
                lambda module, _, output: kinds.append(output.dtype) if torch.is_grad_enabled() else None
            )
            return method

        settings = StreamSettings(steps=2, batch_size=8, lr=[3e-3])
        return run_stream(tasks, build, settings, tmp_path / folder, bf16, seed=7, **how)

    straight = stream("straight")
    stream("stopped", stop_after=1)
    resumed = stream("stopped", resume=True)
    assert seen["straight"] == seen["stopped"] == [torch.bfloat16] * 6
    assert resumed.losses == straight.losses and resumed.matrix == straight.matrix


def test_the_scale_of_losses_starts_alike_in_each_task(make, tasks, tmp_path):
    """Float16 scales losses, at first too much, and skips steps until that fits: as often after a stop as without one."""
    accelerator = Accelerator(cpu=True)
    settings = StreamSettings(steps=4, batch_size=8, lr=[3e-3])

    def stream(folder, **how):
        how = {"seed": 7, **how}
        return run_stream(tasks[:2], lambda: make("lora"), settings, tmp_path / folder, accelerator, **how)

    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = accelerator.scaler.state_dict()
    straight = stream("straight")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    stream("stopped", stop_after=1)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    resumed = stream("stopped", resume=True)
    assert accelerator.scaler.state_dict() == before
    accelerator.scaler = None
    assert resumed.losses == straight.losses != stream("without").losses, "steps were skipped"


def test_what_was_fine_tuned_in_it_is_a_plain_model(make, tasks, bf16):
    method = make("zero_shot")
    images = load_images(tasks[0], method.model, method.processor)
    tuned = finetune(method.model, [images], bf16, steps=2, lr=1e-3, batch_size=8, seed=0)
    batch = {"pixel_values": some_batch()["pixel_values"], **method.tokenize(tasks[0].prompts(tasks[0].templates[0]))}
    plain = CLIPModel(method.model.config)
    plain.load_state_dict(tuned.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(tuned(**batch).logits_per_image, plain.eval()(**batch).logits_per_image)


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
