"""What a watched run notes of its experts: the right numbers, without changing what is learnt, in a report of real files."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Image
from experiments import play, without_seconds
from pools import clip_pool
from test_stream import launch
from torch import nn
from transformers import CLIPImageProcessor

from peft_moe_merge.mtil.expert_watch import SNAPSHOTS, ExpertWatch
from peft_moe_merge.mtil.results import read_results

BOUNDED = {"experts_per_task": 2, "max_experts": 3}
WATCHED = ("snapshots", "activations", "adapter_parameters", "adapter_bytes")


def pictures(size, count=2):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Dataset.from_dict({"image": [PIL.Image.fromarray(one) for one in pixels]}).cast_column("image", Image())


def distances(points):
    return torch.cdist(points.double(), points.double())


@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_outputs_before_and_after_a_merge(activation):
    union = {"merge_routing": "redirect", "merge_strategy": "average", "expert_activation": activation}
    model = clip_pool(tasks=("a", "b"), experts_per_task=3, top_k=2, **union)
    block, layer = list(model.adapted_layers().items())[-1]
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    data = pictures(size)

    read = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].detach()))
    with torch.no_grad(), model.disable_adapter():
        model.eval()
        model.get_image_features(processor(list(data["image"]), return_tensors="pt")["pixel_values"])
    hook.remove()
    model.train()
    x_PD = read[0][:, 0]

    def slow():
        outputs = {}
        for expert in sorted({*model.experts_of_task("a")[block], *model.experts_of_task("b")[block]}):
            tensors = {name: tensor.detach() for name, tensor in model.expert_banks()[block].expert(expert).items()}
            outputs[expert] = []
            for x_D in x_PD:
                hidden = [down @ x_D for down in tensors["down_weight"]]
                if activation == "relu":
                    hidden = [nn.functional.relu(h + b) for h, b in zip(hidden, tensors["down_bias"], strict=True)]
                y = sum(h * up for h, up in zip(hidden, tensors["up_weight"], strict=True))
                outputs[expert].append(y + tensors["up_bias"] if activation == "relu" else y)
        return outputs

    watch = ExpertWatch()
    watch.begin_task(model, data, processor)
    with watch.merging(model):
        pass
    assert watch.history(model)["activations"] is None, "nothing merged"
    before = slow()
    with watch.merging(model):
        model.merge_experts(task="a")
    after = slow()
    assert len(after) == len(before) - 1
    told = watch.history(model)["activations"]
    assert told["block"] == block and model.training
    assert set(before) - set(after) < set(told["changed"]) and len(told["changed"]) == 2
    assert told["before_experts"] == [expert for expert in before for _ in x_PD]
    assert told["after_experts"] == [expert for expert in after for _ in x_PD]
    expected = torch.stack([y for outputs in (before, after) for of_one in outputs.values() for y in of_one])
    got = torch.tensor(told["before"] + told["after"])
    torch.testing.assert_close(distances(got), distances(expected), rtol=1e-3, atol=1e-3)


def test_snapshots_thin_out_and_end_at_the_last_step():
    model = clip_pool()
    watch = ExpertWatch()
    size = model.config.vision_config.image_size
    watch.begin_task(
        model, pictures(size), CLIPImageProcessor(size={"height": size, "width": size}, do_center_crop=False)
    )
    for _ in range(101):
        watch.step(model)
    told = watch.history(model)
    steps = [step for step, _ in told["snapshots"]]
    assert steps == [*range(8, 97, 8), 101] and len(steps) <= SNAPSHOTS
    own = [parameter for name, parameter in model.named_parameters() if "moe_lora" in name]
    assert told["adapter_parameters"] == sum(parameter.numel() for parameter in own)
    assert told["adapter_bytes"] == 4 * told["adapter_parameters"]


@pytest.mark.parametrize("method", ["moe_lora_pool", "moe_lora_merge"])
def test_watching_changes_nothing_and_can_be_resumed(experiment, tmp_path, method):
    settings = {"methods": {**BOUNDED, "merge_every": 1}}
    plain = play(experiment(**settings), tmp_path / "plain", [method])
    watched = play(experiment(**settings), tmp_path / "watched", [method], expert_figures=True)
    play(experiment(**settings), tmp_path / "halves", [method], stop_after=1, expert_figures=True)
    resumed = play(experiment(**settings), tmp_path / "halves", [method], resume=True, expert_figures=True)
    assert without_seconds(resumed) == without_seconds(watched)
    (run,), (bare,) = watched["methods"][method], plain["methods"][method]
    assert run["activations"][1] is not None and (run["activations"][0] is None) == (method == "moe_lora_pool")
    assert [[step for step, _ in of_task] for of_task in run["snapshots"]] == [[1, 2], [1, 2]]
    told = {name: run.pop(name) for name in WATCHED}
    run.pop("seconds"), bare.pop("seconds")
    assert json.dumps(run) == json.dumps(bare)
    assert (told["adapter_bytes"][1] > told["adapter_bytes"][0]) and not set(WATCHED) & set(bare)


def test_the_report_of_a_run_shows_the_experts(tmp_path):
    common = ("--suite", "digits", "--steps", 3, "--batch_size", 8, "--num_experts", 4, "--r", 4, "--merge_every", 2)
    pool = ("--experts_per_task", 2, "--max_experts", 3, "--pool_r", 2)
    methods = ("--methods", "zero_shot", "moe_lora_merge", "moe_lora_pool")
    launch(*common, *pool, *methods, "--expert_figures", "--output_dir", tmp_path)
    page = (tmp_path / "report.html").read_text()
    for heading in ("Experts selected over training", "Experts before and after merging", "What a task adds"):
        assert heading in page
    for method in ("moe_lora_merge", "moe_lora_pool"):
        for what in ("selected", "activations"):
            assert (tmp_path / "figures" / f"{what}_{method}.png").stat().st_size > 5000
    assert {path.name for path in (tmp_path / "figures").iterdir()} >= {"growth.png", "plasticity.png"}
    runs = read_results(tmp_path / "results.json")["methods"]
    assert not set(WATCHED) & set(runs["zero_shot"][0])


def test_without_experts_there_is_nothing_to_show(tmp_path):
    arguments = ("--suite", "digits", "--expert_figures", "--output_dir", tmp_path / "out", "--steps", 3)
    done = launch("--methods", "zero_shot", *arguments, expect=1)
    assert "none of the methods ['zero_shot'] has any: add one of" in done.stderr and "moe_lora_pool" in done.stderr
    assert not (tmp_path / "out").exists()
