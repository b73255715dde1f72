"""Methods that keep something beside weights, in two real processes over gloo: all keep the same, stopped or not."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from processes import run_together
from safetensors.torch import load_file
from small_methods import SETTINGS

from peft_moe_merge.mtil.clip import small_clip
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS
from peft_moe_merge.mtil.stream import Stream, StreamSettings
from peft_moe_merge.selection import load_selector

pytestmark = pytest.mark.slow


def learn(name, folder):
    handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    tasks = load_suite("digits", few_shot=16)
    prompts = [prompt for task in tasks for prompt in task.prompts(task.templates[0])]
    kept = []

    def build():
        kept.append(METHODS[name](*small_clip(prompts), SETTINGS))
        return kept[-1]

    stream = Stream(tasks, StreamSettings(steps=4, batch_size=8, lr=[1e-3]), accelerator)
    stream.run(build, folder / "straight", seed=3)
    own = folder / f"process_{accelerator.process_index}"
    own.mkdir()
    kept[-1].save(own)
    stream.run(build, folder / "resumed", seed=3, stop_after=2)
    stream.run(build, folder / "resumed", seed=3, resume=True)
    accelerator.end_training()


@pytest.mark.parametrize(
    "name", ["der_pp", "o_lora", "inflora", "rail", "slda", "moe_lora_fused", "coda_prompt", "sema"]
)
def test_two_processes_keep_the_same_and_resume(name, tmp_path):
    run_together(2, learn, name, tmp_path)
    folders = [tmp_path / "straight" / "after_3", tmp_path / "resumed" / "after_3"]
    folders += [tmp_path / f"process_{rank}" for rank in range(2)]
    first = {path.relative_to(folders[0]): load_file(path) for path in folders[0].rglob("*.safetensors")}
    assert first
    for folder in folders[1:]:
        for path, tensors in first.items():
            others = load_file(folder / path)
            assert tensors.keys() == others.keys()
            for key, tensor in tensors.items():
                assert torch.equal(tensor, others[key]), (folder.name, key)


def alone(name):
    """What one process learns of the same images."""
    tasks = load_suite("digits", few_shot=16)
    set_seed(3)
    method = METHODS[name](
        *small_clip([prompt for task in tasks for prompt in task.prompts(task.templates[0])]), SETTINGS
    )
    for task in tasks:
        method.learn(task)
    return method


def test_two_processes_share_the_images_of_a_regression(tmp_path):
    run_together(2, learn, "rail", tmp_path)
    together, one = load_file(tmp_path / "straight" / "after_3" / "sums.safetensors"), alone("rail")
    torch.testing.assert_close(together["gram"], one.gram_MM, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together["sums"], one.sums_SM, rtol=1e-5, atol=1e-5)


def test_two_processes_share_the_images_that_gaussians_are_of(tmp_path):
    """Together they come to the sums of one."""
    run_together(2, learn, "slda", tmp_path)
    one = alone("slda")
    together = load_selector(tmp_path / "straight" / "after_3")
    for own, other in zip(one.gaussians.own, together.own, strict=True):
        assert own["images"] == other["images"] and torch.equal(own["counts"], other["counts"])
        torch.testing.assert_close(own["means"], other["means"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.gaussians.shared["scatter"], together.shared["scatter"], rtol=1e-4, atol=1e-4)
