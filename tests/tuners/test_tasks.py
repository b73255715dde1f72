"""Tasks: which one routes a sample, which one trains, and what is refused."""

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from transformers import CLIPForImageClassification, CLIPTextModel, CLIPVisionModel

from peft_moe_merge import MoELoraMergeConfig

TASKS = ["a", "b", "c"]


def adapted(model, tasks=TASKS, **kwargs):
    model = get_peft_model(model, MoELoraMergeConfig(num_experts=6, r=4, tasks=tasks, **kwargs)).eval()
    randomize(model)
    return model


@pytest.fixture
def model(clip):
    return adapted(clip)


def by_task(model, batch):
    outputs = {}
    for index, task in [*enumerate(TASKS), (-1, None)]:
        model.set_task(task)
        outputs[index] = model(**batch)
    return outputs


def test_tasks_differ_and_none_is_plain_clip(model, batch):
    outputs = by_task(model, batch)
    plain = tiny_clip()(**batch)
    assert torch.equal(outputs[-1].logits_per_image, plain.logits_per_image)
    for one, other in ((0, 1), (1, 2), (0, -1)):
        assert (outputs[one].logits_per_image - outputs[other].logits_per_image).abs().max() > 1e-2


@pytest.mark.parametrize("images", [4, 3])  # more images than prompts, and as many
def test_each_image_goes_its_own_tasks_way(model, images):
    batch = tiny_batch(images)
    outputs = by_task(model, batch)
    ids = torch.tensor([2, -1, 0, 2][:images])
    mixed = model(**batch, task_ids=ids)
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(mixed.logits_per_image[row], outputs[task].logits_per_image[row])
        torch.testing.assert_close(mixed.logits_per_text[:, row], outputs[task].logits_per_text[:, row])
        torch.testing.assert_close(mixed.image_embeds[row], outputs[task].image_embeds[row])
        torch.testing.assert_close(mixed.text_embeds[row], outputs[task].text_embeds)
    assert torch.equal(mixed.logits_per_image[1], outputs[-1].logits_per_image[1]), "plain to the last bit"
    assert torch.equal(mixed.image_embeds[1], outputs[-1].image_embeds[1])


def test_one_task_for_all_is_set_task(model, batch):
    outputs = by_task(model, batch)
    for task in (0, 1, 2, -1):
        same = model(**batch, task_ids=torch.full((4,), task))
        assert torch.equal(same.logits_per_image, outputs[task].logits_per_image)
        assert torch.equal(same.text_embeds, outputs[task].text_embeds.expand(4, -1, -1)), (
            "a shape that data can't change"
        )
    # the ids were for those calls only
    model.set_task("b")
    assert torch.equal(model(**batch).logits_per_image, outputs[1].logits_per_image)


def test_contrastive_loss_and_tuple_output_of_a_mixed_batch(model):
    batch = tiny_batch(3)
    ids = torch.tensor([0, 1, -1])
    output = model(**batch, task_ids=ids, return_loss=True)
    logits = output.logits_per_image
    expected = (
        torch.nn.functional.cross_entropy(logits, torch.arange(3))
        + torch.nn.functional.cross_entropy(logits.T, torch.arange(3))
    ) / 2
    torch.testing.assert_close(output.loss, expected)
    as_tuple = model(**batch, task_ids=ids, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], logits)


def test_features_by_sample(model, batch):
    outputs = by_task(model, batch)
    ids = torch.tensor([0, 2, -1, 1])
    features = model.get_image_features(batch["pixel_values"], task_ids=ids).pooler_output
    for row, task in enumerate(ids.tolist()):
        unit = features[row] / features[row].norm()
        torch.testing.assert_close(unit, outputs[task].image_embeds[row])
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    features = model.get_text_features(**prompts, task_ids=torch.tensor([1, -1, 1])).pooler_output
    for row, task in enumerate([1, -1, 1]):
        torch.testing.assert_close(features[row] / features[row].norm(), outputs[task].text_embeds[row])


def test_towers_alone(batch):
    vision = adapted(CLIPVisionModel(tiny_clip().config.vision_config))
    ids = torch.tensor([0, 2, -1, 0])
    mixed = vision(batch["pixel_values"], task_ids=ids).pooler_output
    for index, task in [*enumerate(TASKS), (-1, None)]:
        vision.set_task(task)
        alone = vision(batch["pixel_values"]).pooler_output
        torch.testing.assert_close(mixed[ids == index], alone[ids == index])
    text = adapted(CLIPTextModel(tiny_clip().config.text_config))
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mixed = text(**prompts, task_ids=torch.tensor([1, 0, 1])).pooler_output
    text.set_task("b")
    torch.testing.assert_close(mixed[[0, 2]], text(**prompts).pooler_output[[0, 2]])
    config = tiny_clip().config
    config.num_labels = 5
    classifier = adapted(CLIPForImageClassification(config), modules_to_save=["classifier"])
    assert classifier(batch["pixel_values"], task_ids=ids).logits.shape == (4, 5)
    assert len(classifier.frozen_experts()) == 2


def test_prompts_padded_to_their_longest_or_to_77_give_the_same_features(model, batch):
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    longest = model.get_text_features(**prompts).pooler_output
    padding = {"input_ids": 1, "attention_mask": 0}
    wide = {name: torch.nn.functional.pad(t, (0, 77 - t.shape[1]), value=padding[name]) for name, t in prompts.items()}
    torch.testing.assert_close(model.get_text_features(**wide).pooler_output, longest, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eos", [1, 2])
def test_padding_is_cut_where_nobody_can_miss_it(eos):
    """A tower that pools end tokens needs none of the tokens behind them: neither in value nor in gradient."""
    model = adapted(tiny_clip()).double()
    model.base_model.model.text_model.eos_token_id = eos
    end = 1 if eos == 1 else 49  # with eos_token_id 2, as in older files, CLIP pools the largest token
    tokens = torch.tensor([[0, 5, 6, end], [0, 8, end, 3], [0, 9, 10, end]])
    tokens = torch.nn.functional.pad(tokens, (0, 73), value=end)
    widths = []
    first_block = model.base_model.model.text_model.encoder.layers[0]
    first_block.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(args[0].shape[1]), with_kwargs=True
    )

    def features_and_gradients(**options):
        model.zero_grad()
        features = model.get_text_features(input_ids=tokens, **options).pooler_output
        features.pow(3).sum().backward()
        return features, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    cut, cut_gradients = features_and_gradients(attention_mask=torch.ones_like(tokens))
    whole, whole_gradients = features_and_gradients(output_hidden_states=True)
    assert widths == [4, 77]
    torch.testing.assert_close(cut, whole, rtol=1e-10, atol=1e-10)
    assert cut_gradients.keys() == whole_gradients.keys() and len(cut_gradients) > 8
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(cut_gradients[name], gradient, rtol=1e-9, atol=1e-10)
    with model.disable_adapter():
        model.get_text_features(input_ids=tokens)
    model.set_task(None)
    model.get_text_features(input_ids=tokens)
    assert widths[2:] == [77, 77], "CLIP without experts computes as ever"


def test_prompts_that_begin_differently_are_routed_one_by_one(model):
    ids = torch.tensor([[0, 5, 1], [4, 5, 1]])
    both = model.get_text_features(input_ids=ids).pooler_output
    for row in range(2):
        torch.testing.assert_close(both[row], model.get_text_features(input_ids=ids[row : row + 1]).pooler_output[0])


def test_prompts_of_one_task_share_a_decision_and_its_noise(model, batch):
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.train()
    model.get_text_features(**prompts, task_ids=torch.tensor([2, 0, 2]))
    for task, samples in (("a", 1), ("b", 0), ("c", 2)):
        model.set_task(task)
        for block, counts in model.expert_usage().items():
            expected = [samples] * 2 if samples and block.startswith("text") else []
            assert counts[counts > 0].tolist() == expected, "K experts, each once for every prompt"


def test_only_the_current_tasks_router_trains(model, batch):
    model.set_task("b")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    routers = {name for name in trainable if "routers" in name}
    assert routers and all(name.endswith(".1") for name in routers)
    assert len(routers) == 4 * 2  # 4 blocks, weight and noise
    model.train()
    model(**batch).logits_per_image.sum().backward()
    model.set_task("c")
    gradients = [name for name, p in model.named_parameters() if "routers" in name and p.grad is not None]
    assert gradients == [], "an optimizer of several tasks must not find old gradients"


def test_tasks_can_be_added_later(model, batch):
    before = by_task(model, batch)
    before_it = model.peft_config["default"]
    model.add_task("d")
    config = model.peft_config["default"]
    assert config.tasks == [*TASKS, "d"] and model.current_task is None, "as it was"
    assert before_it.tasks == TASKS, "a config that may serve another model stays as it was"
    after = by_task(model, batch)
    for task in before:
        assert torch.equal(before[task].logits_per_image, after[task].logits_per_image)
    model.set_task("d")
    block = "vision_model.encoder.layers.1.mlp"
    assert not model.router_parameters(block, "d")["weight"].any()
    assert model.expert_usage()[block].tolist() == [0] * 6
    model(**batch, task_ids=torch.tensor([3, 0, 3, -1]))


def test_a_config_serves_several_models(clip):
    config = MoELoraMergeConfig(num_experts=4, r=2, tasks=["a"])
    first, second = get_peft_model(clip, config), get_peft_model(tiny_clip(), config)
    first.add_task("b")
    assert config.tasks == ["a"] and second.peft_config["default"].tasks == ["a"]


def test_disabled_adapter_ignores_task_ids(model, batch):
    with model.disable_adapter():
        plain = model(**batch, task_ids=torch.tensor([0, 1, 2, -1]))
    assert torch.equal(plain.logits_per_image, tiny_clip()(**batch).logits_per_image)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_each_batch_by_its_own_tasks(batch, reentrant):
    """Two batches of different tasks, then one backward pass: each must be recomputed as it was computed."""

    def gradients(checkpointing):
        model = adapted(tiny_clip(), lora_dropout=0.0).double()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads() if reentrant else None
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "noise_weight" in name:  # so little noise that choices stay
                    parameter.zero_()
        model.set_task("a")
        model.train()
        torch.manual_seed(0)
        pixels = batch["pixel_values"].double()
        first = model.get_image_features(pixels, task_ids=torch.tensor([0, 1, 2, -1])).pooler_output
        second = model.get_image_features(pixels, task_ids=torch.tensor([2, 2, 0, 0])).pooler_output
        usage_before = {task: model.expert_usage() for task in TASKS if model.set_task(task) is None}
        model.set_task("a")
        (first.square().sum() + second.pow(3).sum()).backward()
        usage_after = {task: model.expert_usage() for task in TASKS if model.set_task(task) is None}
        for task in TASKS:
            for block, counts in usage_before[task].items():
                assert torch.equal(counts, usage_after[task][block]), "recomputation must not count"
        return {name: p.grad for name, p in model.named_parameters() if "experts" in name and p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 8
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([0, 1, 3, 0]), ValueError, r"\[3\].*3 tasks.*'c'"),
        (torch.tensor([0, 1, -2, 0]), ValueError, r"\[-2\]"),
        (torch.tensor([0, 1, 2]), ValueError, "3 entries for 4 images"),
        (torch.tensor([[0, 1, 2, 0]]), ValueError, r"shape \(batch,\)"),
        (torch.tensor([0.0, 1.0, 2.0, 0.0]), TypeError, "float32"),
        ([0, 1, 2, 0], TypeError, "list"),
    ],
)
def test_wrong_task_ids(model, batch, ids, error, message):
    with pytest.raises(error, match=message):
        model(**batch, task_ids=ids)
    model(**batch)  # and the model is as good as before


def test_wrong_ids_for_a_tower(batch):
    vision = adapted(CLIPVisionModel(tiny_clip().config.vision_config))
    with pytest.raises(ValueError, match="3 entries .* batch of 4"):
        vision(batch["pixel_values"], task_ids=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("act", ["set_task", "router_parameters"])
def test_unknown_task(model, act):
    with pytest.raises(ValueError, match=r"Unknown task 'z'.*\['a', 'b', 'c'\].*add_task"):
        model.set_task("z") if act == "set_task" else model.router_parameters("vision_model.encoder.layers.0.mlp", "z")


@pytest.mark.parametrize("name", ["a", "", None])
def test_task_names_must_be_new(model, name):
    with pytest.raises(ValueError, match="task name|named twice"):
        model.add_task(name)
    assert model.peft_config["default"].tasks == TASKS


def test_unknown_block_and_expert(model):
    with pytest.raises(KeyError, match=r"No adapted block 'mlp'.*vision_model\.encoder\.layers\.0\.mlp"):
        model.expert_parameters("mlp", 0)
    with pytest.raises(IndexError, match="experts 0 to 5"):
        model.expert_parameters("vision_model.encoder.layers.0.mlp", 6)
