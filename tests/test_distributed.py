"""Two real processes over gloo, data parallel and sharded: they decide alike and come to what one process comes to."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import tiny_batch, tiny_clip
from differences import assert_alike
from peft import PeftModel, get_peft_model
from processes import run_together
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback

FSDP2_CONFIG = Path(__file__).parents[1] / "examples" / "accelerate" / "one_node_8_gpus_fsdp2.yaml"
IMAGES, EXPERTS = 8, 6
LABELS = torch.tensor([0, 1, 2, 0, 2, 1, 1, 0])
FIRST_STEPS, STEPS = 30, 50
LOOKS_AT_WEIGHTS = {"merge_pair": "most_similar", "merge_strategy": "aligned", "merge_routing": "mean"}


class SameNoise(TorchFunctionMode):
    """Draws the routing noise of all images of a step, and hands this process that of its own."""

    def __init__(self, rows: slice):
        super().__init__()
        self.rows = rows
        self.generator = torch.Generator().manual_seed(3)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not torch.randn_like:
            return function(*args, **(kwargs or {}))
        rows, experts = args[0].shape
        prompts = rows == 1  # one decision serves them all
        noise = torch.randn(1 if prompts else IMAGES, experts, generator=self.generator, dtype=args[0].dtype)
        return noise if prompts else noise[self.rows]


def accelerator_for(way):
    if way != "fsdp":
        return Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    return sharding_accelerator()


def sharding_accelerator(mixed_precision="no"):
    """What the example configuration makes of Accelerate, on CPUs."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FSDP2_CONFIG), "script.py"])
    told = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    os.environ.update({name: value for name, value in told.items() if name.startswith("FSDP_")})
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy())
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    # Accelerate takes the plugin on GPUs only. What it does with it, it can do here as well.
    accelerator.state.fsdp_plugin = plugin
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def clip_to_shard():
    clip = tiny_clip()
    clip.logit_scale = torch.nn.Parameter(clip.logit_scale.detach().reshape(1))  # FSDP2 takes no scalars
    return clip


def train(way, noise, folder, options):
    """Train on two tasks of 30 and 20 steps with merges, a stop of the routers and freezing; write down what became of it.

    Double precision, since AdamW turns the rounding of a gradient near zero into a step of full length.
    """
    accelerator = accelerator_for(way)
    rank, processes = accelerator.process_index, accelerator.num_processes
    own = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    torch.manual_seed(0)
    config = MoELoraMergeConfig(num_experts=EXPERTS, r=4, lora_dropout=0.0, tasks=["a", "b"], **options)
    clip = (clip_to_shard() if way == "fsdp" else tiny_clip()).double()
    adapted = get_peft_model(clip, config, autocast_adapter_dtype=False)
    own_usage = {}

    def count(name, module, args, output):
        weight = 3 if name.startswith("text") else 1  # one decision serves the three prompts
        own_usage[name] += weight * torch.bincount(output[0].flatten(), minlength=EXPERTS)

    for name, routers in adapted.router_banks().items():
        routers.register_forward_hook(partial(count, name))

    merging, stopping = ExpertMergeCallback(merge_every=7), RouterFreezeCallback(at_step=25)
    told = {}
    torch.manual_seed(100 + rank)
    with SameNoise(own) if noise == "same" else torch.enable_grad():
        for task, steps in (("a", range(FIRST_STEPS)), ("b", range(FIRST_STEPS, STEPS))):
            own_usage.update({name: torch.zeros(EXPERTS, dtype=torch.int64) for name in adapted.router_banks()})
            adapted.set_task(task)
            parameters = [p for p in adapted.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
            model, optimizer = accelerator.prepare(adapted, optimizer)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            model.train()
            for callback in (merging, stopping):
                callback.begin_task(model)
            for step in steps:
                batch = tiny_batch(images=IMAGES, seed=step)
                batch["pixel_values"] = batch["pixel_values"][own].double()
                loss = torch.nn.functional.cross_entropy(model(**batch).logits_per_image, LABELS[own])
                accelerator.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                for callback in (merging, stopping):
                    callback.step(model, optimizer)
            for callback in (merging, stopping):
                callback.end_task(model)
            told |= {f"own/{task}/{name}": counts for name, counts in own_usage.items()}
            told |= {f"usage/{task}/{name}": counts for name, counts in adapted.expert_usage().items()}
            for step, merges in merging.merges:
                told |= {f"merge/{task}/{step}/{name}": torch.tensor(merge) for name, merge in merges.items()}
            told[f"known/{task}"] = torch.tensor(len(optimizer.state))  # to the optimizer: experts ever selected

    if way == "fsdp":
        sharded = [type(module).__name__ for module in adapted.modules() if isinstance(module, FSDPModule)]
        assert sharded.count("FSDPCLIPEncoderLayer") == 4
        assert all(isinstance(p, DTensor) for name, p in adapted.named_parameters() if "moe_lora" in name)
        with pytest.raises(RuntimeError, match="can't be added to a model that is sharded"):
            adapted.add_task("c")
        adapted.peft_config["default"].router_locality_loss = 0.1
        with pytest.raises(ValueError, match="`router_locality_loss` needs whole experts"):
            merging.begin_task(model)
        adapted.peft_config["default"].router_locality_loss = 0.0
    write_down(accelerator, model, adapted, folder, told)


def write_down(accelerator, model, adapted, folder, told):
    """Let each process write what it has in the end, with what is told beside it; and the first one the adapter."""
    for name, tensor in adapted.state_dict().items():
        if "moe_lora" in name:
            told[name] = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    file = folder / f"rank_{accelerator.process_index}.safetensors"
    save_file({name: t.detach().clone().contiguous() for name, t in told.items()}, file)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        adapted.save_pretrained(folder / "adapter", state_dict=state if sharded else None)
    accelerator.end_training()


def outcome(folder, rank=0):
    return load_file(folder / f"rank_{rank}.safetensors")


def assert_processes_agree(folder):
    first, second = outcome(folder, 0), outcome(folder, 1)
    own = {key for key in first if key.startswith("own/")}
    assert first.keys() == second.keys() and len(own) == 8
    for key in first.keys() - own:
        assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
    assert any(not torch.equal(first[key], second[key]) for key in own), "the processes chose differently"
    for key in own:
        assert torch.equal(first[key] + second[key], first[key.replace("own/", "usage/")])
    merges = {tuple(key.split("/")[1:3]) for key in first if key.startswith("merge/")}
    assert merges == {*(("a", step) for step in ("7", "14", "21", "28")), *(("b", step) for step in ("7", "14"))}
    frozen = [tensor.sum() for key, tensor in first.items() if key.endswith("frozen")]
    assert len(frozen) == 4 and all(2 <= count <= 4 for count in frozen)


def assert_like_one_process(what, folder, alone):
    expected = outcome(alone)
    expected |= {  # every process counts for all prompts
        key: 2 * counts for key, counts in expected.items() if key.startswith("usage/") and "text_model" in key
    }
    # of a part of the images; what is under `usage/` again
    own = {key for key in expected if key.startswith("own/") or key.endswith(".usage")}
    actual, expected = ({key: told[key] for key in told.keys() - own} for told in (outcome(folder), expected))
    assert_alike(f"{what}, two processes and one", actual, expected)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run_together(1, train, "ddp", "same", folder, LOOKS_AT_WEIGHTS)
    return folder


def test_data_parallel_is_like_one_process(alone, tmp_path):
    run_together(2, train, "ddp", "same", tmp_path, LOOKS_AT_WEIGHTS)
    assert_processes_agree(tmp_path)
    assert_like_one_process("DDP", tmp_path, alone)


def test_sharded_is_like_one_process(alone, tmp_path):
    run_together(2, train, "fsdp", "same", tmp_path, LOOKS_AT_WEIGHTS)
    assert_processes_agree(tmp_path)
    assert_like_one_process("FSDP2", tmp_path, alone)
    saved, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, alone))
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        if "usage" not in name:
            torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=0)
    model = PeftModel.from_pretrained(tiny_clip(), tmp_path / "adapter")
    assert all(len(frozen) >= 2 for frozen in model.frozen_experts().values())


@pytest.mark.parametrize("way", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_processes_agree_though_each_draws_noise_of_its_own(way, tmp_path):
    """Launched by `torchrun`: what one process selects in a step another may not, in both towers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [*command, __file__, way, str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_processes_agree(tmp_path)


def train_in_bf16():
    accelerator = sharding_accelerator("bf16")
    torch.manual_seed(0)
    model = get_peft_model(clip_to_shard(), MoELoraMergeConfig(num_experts=EXPERTS, r=4))
    decided = []
    for routers in model.router_banks().values():
        routers.register_forward_hook(
            lambda module, args, output: decided.append((module.weight[0].dtype, output[1].dtype))
        )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    torch.manual_seed(accelerator.process_index)
    for step in range(3):
        logits = model(**tiny_batch(images=4, seed=step + 10 * accelerator.process_index)).logits_per_image
        accelerator.backward(torch.nn.functional.cross_entropy(logits, LABELS[:4]))
        optimizer.step()
        optimizer.zero_grad()
    assert len(decided) == 12 and set(decided) == {(torch.float32, torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    accelerator.end_training()


@pytest.mark.slow
def test_routers_decide_in_float32_when_sharded():
    run_together(2, train_in_bf16)


if __name__ == "__main__":
    train(sys.argv[1], "own", Path(sys.argv[2]), {})
