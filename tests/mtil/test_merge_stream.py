"""From the files of a real stream, by the command, to one WEMoE, beside what the tasks' own adapters say."""

import copy
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_moe_merge import WEMoEConfig
from peft_moe_merge.mtil.checkpoint import newest
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.model_merging.from_stream import learnt_tasks, merge_stream

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ["aerial", "flowers"]


def run(example, *arguments):
    before, sys.argv = sys.argv, [example, *map(str, arguments)]
    try:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    finally:
        sys.argv = before


def stream(folder, method, *options):
    few = ["--steps", 3, "--batch_size", 8, "--seeds", 7, "--cpu", "True"]
    run("mtil.py", "--tasks", *TASKS, "--methods", method, *few, "--output_dir", folder, *options)
    return folder / method / "seed_7"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return stream(tmp_path_factory.mktemp("loras"), "lora_per_task", "--lora_r", 4)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return stream(tmp_path_factory.mktemp("pool"), "moe_lora_pool", "--experts_per_task", 1, "--pool_r", 4)


def opened(folder, task):
    """The task's own model, as the stream's method would have it."""
    clip = load_clip(mini_clip_path())[0].eval()
    if folder.parent.name == "lora_per_task":
        place = newest(folder) / f"task_{TASKS.index(task)}"
        return PeftModel.from_pretrained(clip, place).merge_and_unload().eval()
    model = PeftModel.from_pretrained(clip, newest(folder)).eval()
    model.set_task(task)
    return model


@pytest.mark.parametrize("source", ["loras", "pool"])
def test_a_gate_of_one_is_the_tasks_own_mlp_and_heads_are_its_own_texts(source, request):
    folder = request.getfixturevalue(source)
    assert learnt_tasks(folder) == TASKS
    clip, processor = load_clip(mini_clip_path())
    before = {name: p.clone() for name, p in clip.state_dict().items()}
    tasks = load_suite("mini", TASKS)
    model, heads = merge_stream(folder, clip, processor, tasks, WEMoEConfig(rank=4, router_depth=0, scaling=0.5))
    with torch.no_grad():
        for task in tasks:
            own = opened(folder, task.name)
            prompts = [prompt for template in task.templates[:1] for prompt in task.prompts(template)]
            batch = processor.tokenizer(prompts, padding=True, return_tensors="pt")
            texts_CD = own.get_text_features(**batch).pooler_output
            if len(task.templates) == 1:
                torch.testing.assert_close(heads[task.name], texts_CD / texts_CD.norm(dim=1, keepdim=True))
            # the MLP's own weights plus its factors: what the task's own model has there
            position = TASKS.index(task.name)
            block = model.base_model.model.vision_model.encoder.layers[1].mlp
            x = torch.randn(2, 5, clip.config.vision_config.hidden_size)
            block.wemoe_router["default"].bias.copy_(torch.eye(2)[position])
            inner = own.base_model.model if isinstance(own, PeftModel) else own
            torch.testing.assert_close(block(x), inner.vision_model.encoder.layers[1].mlp(x), rtol=1e-4, atol=1e-5)
    restored = model.unload().state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("source", ["loras", "pool"])
def test_one_command_writes_a_model_that_loads(source, request, tmp_path, capsys):
    folder = request.getfixturevalue(source)
    few = ["--train_per_class", 8, "--adapt_steps", 2, "--adapt_batch_size", 4, "--cpu", "True"]
    run("wemoe.py", "--from_stream", folder, "--output_dir", tmp_path, "--rank", 4, *few)
    found = json.loads((tmp_path / "merged.json").read_text())
    assert found["tasks"] == TASKS and set(found["accuracy"]) == {"zero_shot", "merged", "adapted"}
    model = PeftModel.from_pretrained(load_clip(mini_clip_path())[0], tmp_path / "adapter").eval()
    assert model.peft_config["default"].tasks == TASKS
    heads = load_file(tmp_path / "heads.safetensors")
    assert {name: len(head_CD) for name, head_CD in heads.items()} == {"aerial": 12, "flowers": 13}
    assert "adapted" in capsys.readouterr().out


def test_what_is_no_lora_is_said(loras, tmp_path):
    clip, processor = load_clip(mini_clip_path())
    with pytest.raises(ValueError, match="holds no tasks' LoRAs: give the folder of one run"):
        merge_stream(tmp_path, clip, processor, [], WEMoEConfig())
    with pytest.raises(ValueError, match=r"has learnt \['flowers'\], whose classes are not known"):
        merge_stream(loras, clip, processor, load_suite("mini", ["aerial"]), WEMoEConfig())
    twice = stream(tmp_path / "two", "moe_lora_pool", "--experts_per_task", 2, "--pool_r", 2)
    with pytest.raises(ValueError, match="is no LoRA: .* 2 experts"):
        merge_stream(twice, copy.deepcopy(clip), processor, load_suite("mini", TASKS), WEMoEConfig())
