"""Merging and freezing at the right time: in the Trainer, in a loop with Accelerate, with accumulation, across a resume."""

import copy
import warnings

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_clip
from peft import PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback

BLOCK = "vision_model.encoder.layers.0.mlp"
PROMPTS = {"input_ids": torch.tensor([[0, 5, 6, 1], [0, 8, 9, 1]])}


def adapted(**kwargs):
    torch.manual_seed(0)
    config = MoELoraMergeConfig(**{"num_experts": 6, "r": 4, "tasks": ["a", "b"], **kwargs})
    return get_peft_model(tiny_clip(), config)


def images(count=64):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": pixels[i], "labels": int(pixels[i].mean() > 0)} for i in range(count)]


class ClassifyingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        output = model(**inputs, **PROMPTS)
        loss = nn.functional.cross_entropy(output.logits_per_image, labels)
        return (loss, output) if return_outputs else loss


def trainer(model, folder, callback, **kwargs):
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "seed": 7,
            **kwargs,
        }
    )
    return ClassifyingTrainer(model=model, args=arguments, train_dataset=images(), callbacks=[callback])


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "moe_lora" in name}


def test_trainer_merges_every_m_steps_and_freezes_at_the_end(tmp_path, monkeypatch):
    model, seen = adapted(), []
    callback = ExpertMergeCallback(merge_every=5, freeze_top_k=2)
    original = type(model.base_model).merge_experts

    def spy(self, optimizer=None, **kwargs):
        usage = self.expert_usage()[BLOCK]
        seen.append((callback.steps, usage.sum().item()))
        return original(self, optimizer, **kwargs)

    monkeypatch.setattr(type(model.base_model), "merge_experts", spy)
    result = trainer(model, tmp_path, callback).train()
    assert result.global_step == 12
    # 4 images a step, 2 experts each, counted from the start of the task
    assert seen == [(5, 5 * 4 * 2), (10, 10 * 4 * 2)]
    assert [step for step, _ in callback.merges] == [5, 10]
    assert all(set(merges) == set(model.expert_usage()) for _, merges in callback.merges)
    usage = model.expert_usage()
    for block, frozen in model.frozen_experts().items():
        assert frozen == sorted(usage[block].argsort(descending=True, stable=True)[:2].tolist())
    before = model.frozen_experts()
    kept = {b: {e: model.expert_parameters(b, e)["up_weight"].clone() for e in frozen} for b, frozen in before.items()}
    model.set_task("b")
    trainer(model, tmp_path, ExpertMergeCallback(merge_every=4)).train()
    assert model.expert_usage()[BLOCK].sum() == 12 * 4 * 2, "task b counts from zero"
    for block, frozen in model.frozen_experts().items():
        assert set(before[block]) <= set(frozen)
        assert all(torch.equal(kept[block][e], model.expert_parameters(block, e)["up_weight"]) for e in before[block])


def test_routers_stop_in_the_trainer(tmp_path):
    model, callback = adapted(), RouterFreezeCallback(at_fraction=0.5)
    run = trainer(model, tmp_path, callback)
    run.add_callback(ExpertMergeCallback(merge_every=5))
    run.train()
    assert set(callback.stops.values()) == {6} and len(model.stopped_routers()) == 4
    assert not any(p.requires_grad for name, p in model.named_parameters() if "routers" in name)


def test_m_counts_optimizer_steps_under_accumulation_and_checkpointing(tmp_path):
    model = adapted()
    callback = ExpertMergeCallback(merge_every=3)
    kwargs = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "max_steps": 6}
    trainer(model, tmp_path, callback, **kwargs).train()
    assert [step for step, _ in callback.merges] == [3, 6]
    assert model.expert_usage()[BLOCK].sum() == 6 * 2 * 4 * 2, "every micro-batch once"


def test_trainer_resume_equals_not_stopping(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 7, "max_steps": 12}
    straight = adapted()
    trainer(straight, tmp_path / "straight", ExpertMergeCallback(merge_every=5), **kwargs).train()

    resumed = adapted()
    callback = ExpertMergeCallback(merge_every=5)
    again = trainer(resumed, tmp_path / "straight", callback, **kwargs)
    again.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-7"))
    assert [step for step, _ in callback.merges] == [5, 10]
    expected, actual = weights(straight), weights(resumed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():  # weights, counts and frozen flags
        assert torch.equal(tensor, actual[name]), name
    assert [p.requires_grad for p in straight.parameters()] == [p.requires_grad for p in resumed.parameters()]


def test_frozen_experts_survive_a_resume(tmp_path):
    model = adapted()
    trainer(model, tmp_path, ExpertMergeCallback(merge_every=5)).train()
    model.set_task("b")
    kwargs = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4}
    trainer(model, tmp_path / "b", ExpertMergeCallback(merge_every=2), **kwargs).train()
    frozen_by_a = None
    resumed = adapted()
    resumed.set_task("b")
    frozen_by_a = PeftModel.from_pretrained(tiny_clip(), tmp_path / "b" / "checkpoint-3").frozen_experts()
    assert all(len(frozen) == 2 for frozen in frozen_by_a.values())
    run = trainer(resumed, tmp_path / "b", ExpertMergeCallback(merge_every=2), **kwargs)
    run.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    for block, frozen in frozen_by_a.items():
        assert set(frozen) <= set(resumed.frozen_experts()[block])
        for expert in frozen:
            expected = model.expert_parameters(block, expert)
            assert all(torch.equal(t, expected[n]) for n, t in resumed.expert_parameters(block, expert).items())


def accelerate_loop(model, callback, steps=12, accumulate=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loader = DataLoader(images(), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(parameters, lr=1e-2), loader)
    model.train()
    torch.manual_seed(1)
    callback.begin_task(model)
    for batch in list(loader)[: steps * accumulate]:
        with accelerator.accumulate(model):
            labels = batch.pop("labels")
            loss = nn.functional.cross_entropy(model(**batch, **PROMPTS).logits_per_image, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            callback.step(model, optimizer)
    callback.end_task(model)
    return optimizer


def test_the_same_object_in_a_loop_of_ones_own():
    model, callback = adapted(), ExpertMergeCallback(merge_every=5)
    optimizer = accelerate_loop(model, callback)
    assert [step for step, _ in callback.merges] == [5, 10] and callback.steps == 12
    assert model.expert_usage()[BLOCK].sum() == 12 * 4 * 2
    assert all(len(frozen) == 2 for frozen in model.frozen_experts().values())
    last = callback.merges[-1][1][BLOCK]
    bank = model.expert_banks()[BLOCK]
    state = optimizer.state.get(bank.down_weight[last.target], {})
    assert not state or state["step"] <= 2, "its optimizer state began anew at step 10"


def test_accumulation_in_a_loop_of_ones_own():
    model, callback = adapted(), ExpertMergeCallback(merge_every=4)
    accelerate_loop(model, callback, steps=8, accumulate=2)
    assert [step for step, _ in callback.merges] == [4, 8]
    assert model.expert_usage()[BLOCK].sum() == 8 * 2 * 4 * 2


def test_optimizer_state_may_be_kept():
    states = {}
    for choice in ("reset", "keep"):
        model = adapted(num_experts=3)
        optimizer = accelerate_loop(model, ExpertMergeCallback(merge_every=12, optimizer_state=choice))
        bank = model.expert_banks()[BLOCK]
        states[choice] = sum(parameter in optimizer.state for parameter in bank.down_weight)
    assert states == {"reset": 2, "keep": 3}


class Skipping:
    """An optimizer whose scaler met an overflow."""

    step_was_skipped = True
    state = None


def test_skipped_steps_do_not_count():
    model, callback = adapted(), ExpertMergeCallback(merge_every=1)
    callback.begin_task(model)
    callback.step(model, Skipping())
    assert callback.steps == 0 and callback.merges == []


def test_never_merging_and_never_freezing():
    model, callback = adapted(), ExpertMergeCallback(merge_every=None, freeze_top_k=0)
    accelerate_loop(model, callback)
    assert callback.merges == [] and not any(model.frozen_experts().values())
    assert model.expert_usage()[BLOCK].sum() == 12 * 4 * 2


def test_warns_once_when_blocks_cannot_merge():
    model, callback = adapted(num_experts=2), ExpertMergeCallback(merge_every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerate_loop(model, callback)
    ours = [str(warning.message) for warning in caught if "had no merge" in str(warning.message)]
    assert len(ours) == 1 and "4 of 4 blocks had no merge at step 2" in ours[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"merge_every": 0}, "at least 1; got 0"),
        ({"freeze_top_k": -1}, "at least 0; got -1"),
        ({"optimizer_state": "half"}, "'reset' or 'keep', got 'half'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpertMergeCallback(**arguments)


def test_a_model_without_experts(tmp_path):
    with pytest.raises(TypeError, match=r"get_peft_model\(model, MoELoraMergeConfig.*got CLIPModel"):
        trainer(tiny_clip(), tmp_path, ExpertMergeCallback()).train()


def test_merge_does_not_change_what_others_compute():
    """Between two steps of a run a merge moves one expert per block, and no other parameter."""
    model = adapted()
    callback = ExpertMergeCallback(merge_every=None)
    accelerate_loop(model, callback)
    model.base_model.model.vision_model.encoder.layers[0].mlp.moe_lora_experts["default"].frozen.zero_()
    before = copy.deepcopy(weights(model))
    merges = model.merge_experts()
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    for name in changed:
        block = name.removeprefix("base_model.model.").partition(".moe_lora")[0]
        assert name.endswith(f".{merges[block].target}") and "experts" in name
    assert {name.partition(".moe_lora")[0] for name in changed} == {f"base_model.model.{block}" for block in merges}
