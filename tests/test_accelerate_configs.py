"""The configurations in `examples/accelerate`, as Accelerate's own launcher reads them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers.models.clip import modeling_clip

FOLDER = Path(__file__).parents[1] / "examples" / "accelerate"
CONFIGS = {
    "one_node_8_gpus.yaml": (DistributedType.MULTI_GPU, 1, None),
    "one_node_8_gpus_fsdp2.yaml": (DistributedType.FSDP, 1, None),
    "two_nodes_8_gpus.yaml": (DistributedType.MULTI_GPU, 2, "192.168.0.1:29500"),
}


def test_each_is_described():
    assert {path.name for path in FOLDER.glob("*.yaml")} == CONFIGS.keys()
    readme = (FOLDER / "README.md").read_text()
    assert all(name in readme for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_launcher_takes_it(name, monkeypatch):
    distributed_type, nodes, address = CONFIGS[name]
    config = load_config_from_file(str(FOLDER / name))
    assert isinstance(config, ClusterConfig) and config.distributed_type == distributed_type
    assert config.num_machines == nodes and config.num_processes == 8 * nodes

    arguments = launch_command_parser().parse_args(["--config_file", str(FOLDER / name), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert int(arguments.nproc_per_node) == 8
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if address is not None:
        assert (int(arguments.nnodes), arguments.rdzv_endpoint) == (nodes, address)
    if distributed_type == DistributedType.FSDP:
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert all(hasattr(modeling_clip, layer) for layer in plugin.transformer_cls_names_to_wrap)
