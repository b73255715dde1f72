"""Two nodes, each with a network of its own and a cable between them: they come to what two processes on one node do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from nodes import lose, sent_by_cable, two_nodes
from processes import PATIENCE
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
PYTHON = [sys.executable, "-m"]
TWO_NODES = ["--config_file", str(EXAMPLES / "accelerate" / "two_nodes_8_gpus.yaml"), "--main_process_ip", "node-0"]
ONE_NODE = ["--config_file", str(EXAMPLES / "accelerate" / "one_node_8_gpus.yaml"), "--main_process_port", "0"]
MTIL = [
    *(str(EXAMPLES / "mtil.py"), "--cpu", "--suite=digits", "--model=untrained", "--methods=moe_lora_merge"),
    *("--steps=6", "--batch_size=8", "--lr=5e-3", "--num_experts=12", "--r=8", "--merge_every=2", "--resume"),
]


def begin(command, folder):
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def log_of(folder):
    return (folder / "log").read_text()


def finish(processes, folder):
    assert [process.wait(PATIENCE) for process in processes] == [0] * len(processes), log_of(folder)[-3000:]


def assert_same_tensors(folder, other):
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.safetensors"))]
    assert files == [path.relative_to(other) for path in sorted(other.rglob("*.safetensors"))] != []
    for file in files:
        one, two = load_file(folder / file), load_file(other / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()), file


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_torchrun_on_two_nodes(way, tmp_path):
    """With `test_distributed`'s training: each process draws noise of its own."""
    one, two = tmp_path / "one", tmp_path / "two"
    script = ["--", str(HERE / "test_distributed.py"), way]
    one.mkdir()
    two.mkdir()
    finish(
        [begin([*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node=2", *script, str(one)], one)], one
    )
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=node-0:29500"]
    with two_nodes(tmp_path) as nodes:
        command = [*PYTHON, "torch.distributed.run", *meet, *script, str(two)]
        finish([begin([*node, *command], two) for node in nodes.values()], two)
        sent = [sent_by_cable(node) for node in nodes.values()]
    print(f"{way}: nodes sent {sent} bytes")
    assert min(sent) > 2**20
    assert_same_tensors(one, two)


def launch_on(nodes, folder):
    """Start the example on both by the example configuration, for one process each."""
    command = [*PYTHON, "accelerate.commands.launch", *TWO_NODES, "--num_processes=2"]
    return [
        begin([*node, *command, f"--machine_rank={rank}", *MTIL, "--output_dir=run"], folder)
        for rank, node in enumerate(nodes.values())
    ]


def results_of(folder):
    runs = json.loads((folder / "run" / "results.json").read_text())["methods"]["moe_lora_merge"]
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def test_the_example_configuration_on_two_nodes(tmp_path):
    """In bf16, as it says. Then one of the nodes is lost, and after a new start nothing tells that it was."""
    one, two, lost = (tmp_path / name for name in ("one", "two", "lost"))
    for folder in (one, two, lost):
        folder.mkdir()
    command = [*PYTHON, "accelerate.commands.launch", *ONE_NODE, "--num_processes=2", *MTIL, "--output_dir=run"]
    finish([begin(command, one)], one)
    with two_nodes(tmp_path) as nodes:
        finish(launch_on(nodes, two), two)
        assert_same_tensors(one, two)
        assert results_of(one) == results_of(two)

        processes = launch_on(nodes, lost)
        deadline = time.monotonic() + PATIENCE
        while not (lost / "run/moe_lora_merge/seed_42/after_1").exists() and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes), log_of(lost)[-3000:]
            time.sleep(0.05)
        lose(nodes["node-1"])
        began = time.monotonic()
        assert processes[0].wait(PATIENCE) == 1 and processes[1].wait() < 0
        print(f"node 0 ended {time.monotonic() - began:.1f} s after node 1")
        assert "Process 0 of 2 had to stop in task 'digits_" in log_of(lost) and "--resume" in log_of(lost)
        finish(launch_on(nodes, lost), lost)
    assert_same_tensors(one, lost)
    assert results_of(one) == results_of(lost)
