"""Configurations that contradict themselves are refused, with the value and the way out."""

import json

import pytest
import torch
from conftest import tiny_clip
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_moe_merge import MoELoraMergeConfig


def test_defaults_are_the_papers():
    config = MoELoraMergeConfig()
    assert (config.num_experts, config.top_k, config.r) == (55, 2, 64)
    assert config.lora_alpha / config.r == pytest.approx(0.1) and config.lora_dropout == 0.1
    assert config.tasks == ["default"] and config.current_task == "default"
    model = get_peft_model(tiny_clip(), config)
    assert sorted(model.expert_usage()) == [
        f"{tower}_model.encoder.layers.{layer}.mlp" for tower in ("text", "vision") for layer in (0, 1)
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 3, "num_experts": 2}, "top_k=3 .* num_experts=2"),
        ({"r": 0}, "`r` must be a positive integer, got 0"),
        ({"r": 2.5}, "`r` must be a positive integer, got 2.5"),
        ({"num_experts": -1}, "`num_experts` must be a positive integer, or 'grow', got -1"),
        ({"top_k": 0}, "`top_k` must be a positive integer"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` must lie in \[0, 1\), got 1.0"),
        ({"tasks": []}, "at least one task name"),
        ({"tasks": "aircraft"}, "list of at least one task name, got 'aircraft'"),
        ({"tasks": ["a", "b", "a"]}, "'a' is named twice"),
        ({"tasks": ["a", ""]}, "non-empty string"),
        ({"tasks": ["a"], "current_task": "b"}, r"Unknown task 'b'. Tasks with a router: \['a'\]"),
        ({"expert_input": "both"}, r"`expert_input` must be one of \('residual', 'normalized'\), got 'both'"),
        ({"merge_strategy": "sum"}, "`merge_strategy` must be one of"),
        ({"merge_pair": "best"}, "`merge_pair` must be one of"),
        ({"layers_pattern": "layers"}, "give both or neither"),
        ({"target_modules": "x.*", "layers_to_transform": [0]}, "regular expression target_modules='x"),
        ({"format_version": 99}, "format_version=99.*reads up to 2.*pip install -U"),
    ],
)
def test_contradictions(fields, message):
    with pytest.raises(ValueError, match=message):
        MoELoraMergeConfig(**fields)


def test_file_of_a_newer_release(tmp_path):
    get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=3, r=2)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for change, message in (
        ({"format_version": 3}, "format_version=3"),
        ({"gate": "cosine"}, "no field 'gate'.*newer"),
    ):
        path.write_text(json.dumps({**saved, **change}))
        for load in (
            lambda: PeftConfig.from_pretrained(tmp_path),
            lambda: MoELoraMergeConfig.from_pretrained(tmp_path),
            lambda: PeftModel.from_pretrained(tiny_clip(), tmp_path),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                load()


def test_targets(clip):
    def blocks(**fields):
        return set(get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=3, r=2, **fields)).expert_usage())

    assert blocks(layers_to_transform=[1]) == {f"{t}_model.encoder.layers.1.mlp" for t in ("text", "vision")}
    assert blocks(target_modules=r"vision_model.*\.mlp") == {f"vision_model.encoder.layers.{i}.mlp" for i in (0, 1)}
    assert blocks(exclude_modules=r"vision.*") == {f"text_model.encoder.layers.{i}.mlp" for i in (0, 1)}
    assert blocks(target_modules=["q_proj"], layers_to_transform=0) == {
        f"{t}_model.encoder.layers.0.self_attn.q_proj" for t in ("text", "vision")
    }


def test_targets_that_cannot_be(clip):
    with pytest.raises(TypeError, match=r"'text_model.encoder.layers.0.layer_norm2' is a LayerNorm.*`target_modules`"):
        get_peft_model(clip, MoELoraMergeConfig(num_experts=3, target_modules=["layer_norm2"]))
    with pytest.raises(ValueError, match="Target modules .*nothing.* not found"):
        get_peft_model(tiny_clip(), MoELoraMergeConfig(num_experts=3, target_modules=["nothing"]))
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), MoELoraMergeConfig(num_experts=3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


def test_mlp_block_without_a_residual_stream():
    with pytest.raises(ValueError, match="no `layer_norm2`.*expert_input='normalized'"):
        get_peft_model(nn.Sequential(Block()), MoELoraMergeConfig(num_experts=3, r=2, target_modules=["0"]))
    config = MoELoraMergeConfig(
        num_experts=3, r=2, target_modules=["0"], expert_input="normalized", init_weights=False
    )
    model = get_peft_model(nn.Sequential(Block()), config).eval()
    x = torch.randn(2, 5, 4)
    assert not torch.equal(model(x), model.base_model.model[0].base_layer(x))


@pytest.mark.parametrize("name", ["1", "weight", "encoder", "mlp"])
def test_adapter_names_that_would_be_mistaken_for_weights(clip, name):
    with pytest.raises(ValueError, match=f"can't be called '{name}'"):
        get_peft_model(clip, MoELoraMergeConfig(num_experts=3, r=2), adapter_name=name)
