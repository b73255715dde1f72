"""Two real processes over gloo: counts are sums, and both decide, merge and freeze alike."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from conftest import tiny_batch, tiny_clip
from peft import get_peft_model
from safetensors.torch import save_file

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig

accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
rank, processes = accelerator.process_index, accelerator.num_processes
model = tiny_clip()
torch.manual_seed(0)
model = get_peft_model(model, MoELoraMergeConfig(num_experts=6, r=4, lora_dropout=0.0))
unwrapped = model
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model, optimizer = accelerator.prepare(model, optimizer)
model.train()
callback = ExpertMergeCallback(merge_every=4)
callback.begin_task(model)
torch.manual_seed(100 + rank)  # every process draws routing noise of its own
own_usage = {name: torch.zeros(6, dtype=torch.int64) for name in unwrapped.base_model._routers()}
def count(name, module, args, output):
    weight = 3 if name.startswith("text") else 1  # one decision serves the three prompts
    own_usage[name] += weight * torch.bincount(output[0].flatten(), minlength=6)


for name, routers in unwrapped.base_model._routers().items():
    routers.register_forward_hook(partial(count, name))
for step in range(10):
    batch = tiny_batch(images=4, seed=10 * step + rank)
    loss = torch.nn.functional.cross_entropy(model(**batch).logits_per_image, torch.tensor([0, 1, 2, 0]))
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    callback.step(model, optimizer)
callback.end_task(model)
usage = unwrapped.expert_usage()
state = {name: tensor.contiguous() for name, tensor in unwrapped.state_dict().items() if "moe_lora" in name}
state |= {f"own/{name}": tensor for name, tensor in own_usage.items()}
state |= {f"usage/{name}": tensor for name, tensor in usage.items()}
for step, merges in callback.merges:
    state |= {f"merge/{step}/{name}": torch.tensor(merge) for name, merge in merges.items()}
save_file(state, Path(sys.argv[1]) / f"rank_{rank}.safetensors")
accelerator.end_training()
"""


def test_two_processes_agree(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"rank_{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    own = {key for key in first if key.startswith("own/")}
    for key in first.keys() - own:
        assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
    assert any(not torch.equal(first[key], second[key]) for key in own), "the processes chose differently"
    for key in own:
        assert torch.equal(first[key] + second[key], first[key.replace("own/", "usage/")])
    assert {key.split("/")[1] for key in first if key.startswith("merge/")} == {"4", "8"}
    frozen = [tensor.sum() for key, tensor in first.items() if key.endswith("frozen")]
    assert len(frozen) == 4 and all(count == 2 for count in frozen)
