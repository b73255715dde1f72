"""The tuner in the hands of a `Trainer`: columns, losses, optimizers, and what is saved of the current task."""

import copy
import warnings

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPForImageClassification, Trainer, TrainerCallback, TrainingArguments

from peft_moe_merge import MoELoraMergeConfig

TASKS = ["a", "b"]
FORMS = ["published", "pool"]
both_forms = pytest.mark.parametrize("form", FORMS)


def config(form="published", **values):
    if form == "pool":
        return MoELoraMergeConfig.pool(**{"tasks": TASKS, "r": 4, **values})
    return MoELoraMergeConfig(
        **{"num_experts": 6, "r": 4, "lora_dropout": 0.0, "router_noise": 0.0, "tasks": TASKS, **values}
    )


def classifier(form="published", **values):
    torch.manual_seed(0)
    settings = copy.deepcopy(tiny_clip().config)
    settings.num_labels = 3
    torch.manual_seed(0)
    model = get_peft_model(CLIPForImageClassification(settings), config(form, **values))
    randomize(model)
    return model


def clip(form="published", **values):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), config(form, **values))
    randomize(model)
    return model


def samples(ids):
    """One image for each task id, with a label and a column that no model knows."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(ids), 3, 16, 16, generator=generator)
    return [
        {"pixel_values": pixels[i], "labels": i % 3, "task_ids": task, "file_name": i} for i, task in enumerate(ids)
    ]


def trainer(model, folder, train=None, kind=Trainer, callbacks=None, **values):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "seed": 7,
    }
    arguments = TrainingArguments(**{**arguments, **values})
    return kind(model=model, args=arguments, train_dataset=train, callbacks=callbacks)


@both_forms
def test_a_column_of_task_ids_routes_training(form, tmp_path):
    """It survives though columns that the model does not know are removed, here `file_name`."""
    model = classifier(form)
    model.set_task("a")
    ids = [0, 0, 0, 1, -1, 0, 1, 0]  # so that every batch has an image of the task that trains
    trainer(model, tmp_path, samples(ids), remove_unused_columns=True, max_steps=4).train()  # two epochs
    for task, name in enumerate(TASKS):
        for block, counts in model.expert_usage(name).items():
            assert counts.sum() == 2 * 2 * ids.count(task), f"two epochs, two experts a sample: {block}"


@both_forms
def test_predict_over_batches_of_mixed_tasks(form, tmp_path):
    model = classifier(form)
    ids = [0, 1, -1, 1, 0, 0, 0, 0, -1, -1]  # the last batch is a smaller one
    data = samples(ids)
    predicted = torch.as_tensor(trainer(model, tmp_path).predict(data).predictions)
    assert predicted.shape == (10, 3)
    pixels = torch.stack([sample["pixel_values"] for sample in data])
    for task, name in [*enumerate(TASKS), (-1, None)]:
        model.set_task(name)
        with torch.no_grad():
            alone = model(pixel_values=pixels).logits
        rows = torch.tensor(ids) == task
        torch.testing.assert_close(predicted[rows], alone[rows])


def test_predict_with_prompts_gives_arrays_of_one_shape(tmp_path):
    """A CLIP's outputs of all batches are joined, whether a batch holds one task or several."""
    model, ids = clip(), [0, 1, -1, 1, 0, 0, 0, 0]
    prompts = {name: tiny_batch()[name] for name in ("input_ids", "attention_mask")}

    def collate(rows):
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "task_ids": torch.tensor([row["task_ids"] for row in rows]), **prompts}

    data = samples(ids)
    predicting = trainer(model, tmp_path)
    predicting.data_collator = collate
    ignored = ["logits_per_text", "text_model_output", "vision_model_output"]
    scores, texts, _ = map(torch.as_tensor, predicting.predict(data, ignore_keys=ignored).predictions)
    assert scores.shape == (8, 3) and texts.shape == (8, 3, 16)
    with torch.no_grad():
        expected = model(**collate(data))
    torch.testing.assert_close(scores, expected.logits_per_image)
    torch.testing.assert_close(texts, expected.text_embeds)


@both_forms
def test_micro_batches_come_to_what_the_whole_batch_does(form, tmp_path):
    """Also with losses on routers, of which the `Trainer` knows nothing."""
    data, learnt = samples([0] * 8), {}
    for size in (8, 4):
        model = classifier(form, router_locality_loss=0.1)
        model.set_task("a")
        values = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        trainer(model, tmp_path, data, max_steps=1, **values).train()
        learnt[size] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    before = dict(classifier(form).named_parameters())
    for name, parameter in learnt[8].items():
        torch.testing.assert_close(learnt[4][name], parameter, atol=1e-6, rtol=1e-4)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in learnt[8].items())


class KeepGradients(TrainerCallback):
    def __init__(self, model):
        self.model = model

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


@both_forms
def test_router_losses_join_the_loss_that_is_returned(form, tmp_path):
    data = samples([0, 1, 0, 1])
    inputs = {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in data]),
        "labels": torch.tensor([sample["labels"] for sample in data]),
        "task_ids": torch.tensor([0, 1, 0, 1]),
    }
    gradients, losses = {}, {}
    for weight in (0.0, 10.0):
        model = classifier(form, router_balance_loss=weight).train()
        losses[weight] = model(**inputs).loss
        assert model.auxiliary_loss() == 0, "none is set" if not weight else "it has joined"
        unlabelled = model(pixel_values=inputs["pixel_values"], task_ids=inputs["task_ids"])
        assert unlabelled.loss is None
        auxiliary = model.auxiliary_loss()  # which has not joined anything
        keep = KeepGradients(model)
        trainer(model, tmp_path, data, callbacks=[keep], max_steps=1).train()
        gradients[weight] = keep.gradients
    assert auxiliary >= 10 * 0.9, "a balance loss is 1 when balanced, and about so or more else"
    torch.testing.assert_close(losses[10.0], losses[0.0] + auxiliary)
    routers = [name for name in gradients[0.0] if "routers" in name]
    assert routers
    assert any(not torch.allclose(gradients[10.0][name], gradients[0.0][name]) for name in routers)


def told(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "no optimizer" in str(w.message)]


class SecondTaskInBetween(TrainerCallback):
    def __init__(self, model):
        self.model = model

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.model.set_task("b")


def images(count=16):
    return [{name: sample[name] for name in ("pixel_values", "labels")} for sample in samples([0] * count)]


@both_forms
def test_one_trainer_for_two_tasks_warns(form, tmp_path):
    model = classifier(form)
    both = trainer(model, tmp_path, images(), callbacks=[SecondTaskInBetween(model)], max_steps=6)
    messages = told(both.train)
    assert len(messages) == 1 and "no optimizer knows" in messages[0] and "for each task" in messages[0]


@both_forms
def test_a_trainer_for_each_task_does_not_warn(form, tmp_path):
    model = classifier(form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def train_both():
        for task in TASKS:
            model.set_task(task)
            trainer(model, tmp_path, images(), max_steps=4).train()

    assert told(train_both) == []
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    for task in range(2):
        assert any(name.endswith(f".weight.{task}") and "routers" in name for name in changed)


@both_forms
def test_no_task_is_saved_and_loaded_as_no_task(form, tmp_path):
    model = clip(form)
    model.set_task(None)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path).eval()
    assert loaded.current_task is None
    with torch.no_grad():
        plain = tiny_clip()(**tiny_batch()).logits_per_image
        assert torch.equal(loaded(**tiny_batch()).logits_per_image, plain)
        loaded.set_task("b")
        model.eval().set_task("b")
        found, expected = loaded(**tiny_batch()).logits_per_image, model(**tiny_batch()).logits_per_image
    assert torch.equal(found, expected) and not torch.equal(found, plain)


def test_resetting_usage_without_a_task_keeps_counts():
    model = clip().train()
    model(**tiny_batch(), task_ids=torch.tensor([0, 1, 0, 0]))
    counted = {task: model.expert_usage(task) for task in TASKS}
    assert all(counts.any() for usage in counted.values() for counts in usage.values())
    model.set_task(None)
    model.reset_expert_usage()
    for task in TASKS:
        assert all(torch.equal(counts, counted[task][block]) for block, counts in model.expert_usage(task).items())
    model.set_task("a")
    model.reset_expert_usage()
    assert not any(counts.any() for counts in model.expert_usage("a").values())
    assert all(torch.equal(counts, counted["b"][block]) for block, counts in model.expert_usage("b").items())


@both_forms
def test_a_model_keeps_the_very_config_it_was_given(form):
    given = config(form)
    written = given.to_dict()
    model = get_peft_model(tiny_clip(), given)
    assert model.peft_config["default"] is given
    model.set_task("b")
    model.add_task("c")
    assert given.current_task == "a" and given.tasks == TASKS, "changes are made to another"
    assert model.peft_config["default"].tasks == ["a", "b", "c"]
    assert {name: given.to_dict()[name] for name in ("tasks", "current_task", "num_experts", "r")} == {
        name: written[name] for name in ("tasks", "current_task", "num_experts", "r")
    }


@pytest.mark.parametrize("active", ["default", "other"])
def test_bake_task_beside_an_adapter_that_saves_other_modules(active):
    model = clip(modules_to_save=["visual_projection"])
    model.add_adapter("other", config(modules_to_save=["text_projection"]))
    randomize(model, seed=3)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.set_adapter(active)
    model.set_task("b")
    model.eval()
    with torch.no_grad():
        expected = model(**tiny_batch()).logits_per_image
        baked = model.bake_task("b")
        torch.testing.assert_close(baked(**tiny_batch()).logits_per_image, expected)
        assert torch.equal(model(**tiny_batch()).logits_per_image, expected), "and the model is as it was"
    saved = {name.split(".")[-4] for name, _ in baked.named_parameters() if "modules_to_save" in name}
    assert saved == {"visual_projection" if active == "default" else "text_projection"}
    assert isinstance(baked.get_base_model(), nn.Module)
