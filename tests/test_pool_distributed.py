"""The expert pool in two real processes over gloo, data parallel and sharded, and compiled: as one plain process."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from conftest import tiny_batch, tiny_clip
from differences import assert_alike
from peft import PeftModel, get_peft_model
from processes import run_together
from safetensors.torch import load_file
from test_distributed import LABELS, clip_to_shard, sharding_accelerator, write_down

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig

IMAGES = 8
MERGING = {"merge_at": "task_end", "experts_per_task": 3, "top_k": 2}


def accelerator_for(way, find_unused):
    if way == "fsdp":
        return sharding_accelerator()
    handler = DistributedDataParallelKwargs(find_unused_parameters=find_unused)
    return Accelerator(cpu=True, kwargs_handlers=[handler])


def train(way, folder, fields):
    """Train on two tasks, of which the second is added between them where the model is not sharded. Double precision."""
    accelerator = accelerator_for(way, find_unused=bool(fields))
    rank, processes = accelerator.process_index, accelerator.num_processes
    own = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    torch.manual_seed(0)
    config = MoELoraMergeConfig.pool(tasks=["a", "b"] if way == "fsdp" else ["a"], r=3, **fields)
    clip = (clip_to_shard() if way == "fsdp" else tiny_clip()).double()
    adapted = get_peft_model(clip, config, autocast_adapter_dtype=False)
    if way != "fsdp":
        adapted.add_task("b")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "moe_lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(100 + rank)
    merging, merges = ExpertMergeCallback(1 if fields else None, merge_after=0.5), []
    for task, steps in (("a", range(10)), ("b", range(10, 16))):
        adapted.set_task(task)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(adapted, optimizer)
        model.train()
        merging.begin_task(model, total_steps=len(steps))
        for step in steps:
            batch = tiny_batch(images=IMAGES, seed=step)
            batch["pixel_values"] = batch["pixel_values"][own].double()
            loss = torch.nn.functional.cross_entropy(model(**batch).logits_per_image, LABELS[own])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            merging.step(model, optimizer)
        merging.end_task(model)
        merges += [merge for _, blocks in merging.merges for merge in blocks.values()]
    told = {"merges": torch.tensor([list(merge) for merge in merges])}
    write_down(accelerator, model, adapted, folder, told)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to, by the fields."""
    known = {}

    def outcome(fields):
        key = str(fields)
        if key not in known:
            folder = known[key] = tmp_path_factory.mktemp("alone")
            run_together(1, train, "ddp", folder, fields)
        return known[key]

    return outcome


@pytest.mark.parametrize(
    ("way", "fields"),
    [("ddp", {}), ("ddp", MERGING), ("fsdp", {}), pytest.param("fsdp", MERGING, marks=pytest.mark.slow)],
    ids=["ddp", "ddp, merging", "fsdp2", "fsdp2, merging"],
)
def test_two_processes_come_to_what_one_does(way, fields, alone, tmp_path):
    run_together(2, train, way, tmp_path, fields)
    first, second = (load_file(tmp_path / f"rank_{rank}.safetensors") for rank in (0, 1))
    expected = load_file(alone(fields) / "rank_0.safetensors")
    assert first.keys() == second.keys() == expected.keys()
    assert len(first["merges"]) == (24 * 2 * 2 if fields else 0), "to one expert, in every layer, by both tasks"
    usage = {name for name in expected if name.endswith("usage")}  # every process counts for all prompts
    first, second, expected = ({n: told[n] for n in told.keys() - usage} for told in (first, second, expected))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "the processes differ"
    assert_alike(f"the pool, {way}, two processes and one", first, expected)
    saved, plain = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (tmp_path, alone(fields))
    )
    assert saved.keys() == plain.keys()
    for name, tensor in plain.items():
        if "usage" not in name:
            torch.testing.assert_close(saved[name], tensor, atol=1e-5, rtol=0)
    model = PeftModel.from_pretrained(tiny_clip(), tmp_path / "adapter").eval()
    one = PeftModel.from_pretrained(tiny_clip(), alone(fields) / "adapter").eval()
    ids = torch.tensor([0, 1, -1, 1])
    with torch.no_grad():
        both = [m(**tiny_batch(images=4), task_ids=ids).logits_per_image for m in (model, one)]
    torch.testing.assert_close(*both, atol=1e-3, rtol=0)
