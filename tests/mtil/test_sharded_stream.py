"""A stream under FSDP2, in two real processes over gloo: tasks add parameters between trainings, and it comes to what DDP does.

What DDP does is compared with one process elsewhere; a stream of one crops images otherwise than each of two does.
"""

import json
from dataclasses import replace

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from differences import assert_alike
from processes import run_together
from safetensors.torch import load_file
from test_distributed import sharding_accelerator

from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings


def in_double(method):
    """In double precision, since AdamW turns the rounding of a gradient near zero into a step of full length."""

    class Double(method):
        def loss(self, model, batch):
            return super().loss(model, {**batch, "pixel_values": batch["pixel_values"].double()})

        def image_features(self, pixel_values):
            return super().image_features(pixel_values.double())

    return Double


def learn(way, name, folder, settings, stops=(2, None), crop_scale=0.9):
    """Learn, and leave after so many tasks and go on, once or more."""
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = sharding_accelerator() if way == "fsdp" else Accelerator(cpu=True, kwargs_handlers=[handler])
    tasks = [replace(task, test=task.test.select(range(48))) for task in load_suite("digits")]
    prompts = [prompt for task in tasks for prompt in task.prompts(task.templates[0])]

    def build():
        clip, processor = small_clip(prompts)
        if not METHODS[name].trains:
            return METHODS[name](clip, processor, MethodSettings(**settings))
        return in_double(METHODS[name])(clip.double(), processor, MethodSettings(**settings))

    training = StreamSettings(steps=6, batch_size=8, lr=[1e-3], max_grad_norm=0.5, crop_scale=crop_scale)
    for tasks_done in stops:
        Stream(tasks, training, accelerator).run(build, folder, seed=3, resume=True, stop_after=tasks_done)
    accelerator.end_training()


def outcome(folder):
    (last,) = folder.glob("after_*")
    progress, _ = checkpoint.load(folder, json.loads((last / "progress.json").read_text())["settings"])
    files = {path.relative_to(last).as_posix(): load_file(path) for path in sorted(last.rglob("*.safetensors"))}
    return vars(progress), {
        f"{file}/{name}": tensor for file, tensors in files.items() for name, tensor in tensors.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    {
        "moe_lora_pool": {"pool_r": 2, "max_experts": 5, "experts_per_task": 2},
        "moe_lora_warm": {"pool_r": 2},
        "moe_lora_merge": {"num_experts": 8, "r": 2, "merge_every": 2},
        "moe_adapters": {"num_experts": 8, "r": 2},
        "lora_per_task": {"lora_r": 2},
        "lora": {"lora_r": 2},
        "lora_soup": {"lora_r": 2},
        "magmax": {"lora_r": 2},
        "finetune": {},
        "wise_ft": {},
        "lwf": {},
        "lwf_vr": {"extra_batch_size": 8},
        "zscl": {"extra_batch_size": 8, "average_every": 4},
        "icarl": {"extra_batch_size": 8, "exemplars": 20},
        "der_pp": {"extra_batch_size": 8, "exemplars": 20},
        "rail": {"rail_features": 96},
        "slda": {},
        "moe_lora_fused": {},
        "lora_fused": {"lora_r": 4},
        "zero_shot": {},
    }.items(),
)
def test_a_sharded_stream_comes_to_what_data_parallel_training_does(name, settings, tmp_path):
    run_together(2, learn, "ddp", name, tmp_path / "ddp", settings)
    run_together(2, learn, "fsdp", name, tmp_path / "fsdp", settings)
    (progress, weights), (expected, plain) = outcome(tmp_path / "fsdp"), outcome(tmp_path / "ddp")
    assert progress["matrix"] == expected["matrix"] and len(progress["matrix"]) == 3
    assert progress["trainable_parameters"] == expected["trainable_parameters"], "of whole parameters"
    assert_alike(f"{name}, FSDP2 and DDP", weights, plain)


def test_what_can_not_be_put_together_is_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(type(accelerator.state)._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="Launch it data parallel .DDP., or sharded by FSDP2"):
        Stream(load_suite("digits"), StreamSettings(), accelerator)


@pytest.mark.parametrize("name", ["o_lora", "inflora", "coda_prompt", "sema"])
def test_methods_that_can_not_be_sharded_say_so(name, monkeypatch):
    stream = Stream(load_suite("digits"), StreamSettings(), Accelerator(cpu=True))
    stream.check(METHODS[name], MethodSettings())
    monkeypatch.setitem(type(stream.accelerator.state)._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=f"{name} can't be trained in parts .FSDP2.. Launch it data parallel"):
        stream.check(METHODS[name], MethodSettings())
    stream.check(METHODS["moe_lora_pool"], MethodSettings())
