"""A call of a model gives what it alone would give: beside threads, replicas, copies, compilers, and calls that fail."""

import copy
import inspect
import io
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from torch import nn
from transformers import CLIPModel, CLIPVisionModel, SiglipConfig, SiglipModel

from peft_moe_merge import MoELoraMergeConfig

TASKS = ["a", "b", "c"]
IDS = [[2, -1, 0, 2], [1, 1, 0, -1], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 1, 2, 1]]
PUBLISHED, POOL = "published", "pool"
both_forms = pytest.mark.parametrize("form", [PUBLISHED, POOL])


def config(form=PUBLISHED, **values):
    if form == POOL:
        return MoELoraMergeConfig.pool(tasks=TASKS, **{"r": 4, **values})
    return MoELoraMergeConfig(**{"num_experts": 6, "r": 4, "lora_dropout": 0.0, "tasks": TASKS, **values})


def adapted(form=PUBLISHED, base=None, **values):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip() if base is None else base, config(form, **values)).eval()
    randomize(model)
    return model


def logits(model, ids=None, seed=0):
    with torch.no_grad():
        return model(**tiny_batch(seed=seed), task_ids=None if ids is None else torch.tensor(ids)).logits_per_image


def in_threads(jobs):
    """Run all at the same time, begun together."""
    barrier = Barrier(len(jobs))

    def begin(job):
        barrier.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result() for future in [threads.submit(begin, job) for job in jobs]]


def all_equal(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------------ threads


@both_forms
@pytest.mark.parametrize("other_has_ids", [True, False])
def test_threads_give_what_each_alone_gives(form, other_has_ids):
    model = adapted(form)
    model.set_task("b")

    def job(shift, with_ids=True):
        return lambda: [logits(model, IDS[(i + shift) % 5] if with_ids else None, seed=i % 7) for i in range(50)]

    jobs = [job(0), job(2, other_has_ids)]
    alone = [job() for job in jobs]
    assert not torch.equal(alone[0][0], alone[1][0]), "else one could be given for the other"
    for together, serial in zip(in_threads(jobs), alone, strict=True):
        assert all_equal(together, serial)


@both_forms
def test_a_thread_that_routes_parts_leaves_others_alone(form):
    """`route` reaches the blocks of calls in its own thread, and ends with its block."""
    model = adapted(form)
    model.set_task("b")
    tower, pixels = model.get_base_model().vision_model, tiny_batch()["pixel_values"]

    def job(ids):
        def run():
            found = []
            for _ in range(25):
                with torch.no_grad(), model.route(None if ids is None else torch.tensor(ids)):
                    found.append(tower(pixels).pooler_output)
                with torch.no_grad():
                    found.append(tower(pixels).pooler_output)
            return found

        return run

    jobs = [job(IDS[0]), job(None)]
    alone = [job() for job in jobs]
    assert not torch.equal(alone[0][0], alone[0][1])
    for together, serial in zip(in_threads(jobs), alone, strict=True):
        assert all_equal(together, serial)


# ----------------------------------------------------------------------------------------------------------- replicas


def replica_of(network):
    """A replica as `torch.nn.parallel.replicate` builds it, with copies through which gradients reach the originals."""
    modules = {module: module._replicate_for_data_parallel() for module in network.modules()}
    parameters = {parameter: parameter.clone() for parameter in network.parameters()}
    for original, replica in modules.items():
        replica._former_parameters = {}
        for name, child in original._modules.items():
            if child is None:
                replica._modules[name] = None
            else:
                setattr(replica, name, modules[child])
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameters[parameter])
                replica._former_parameters[name] = parameters[parameter]
        for name, buffer in original._buffers.items():
            if buffer is None:
                replica._buffers[name] = None
            else:
                setattr(replica, name, buffer.clone())
    return modules[network]


def usage(model):
    return {(task, block): counts for task in TASKS for block, counts in model.expert_usage(task).items()}


@both_forms
def test_replicas_of_data_parallel_give_what_the_model_gives(form):
    model = adapted(form, router_noise=0.0).train()
    model.set_task("a")
    halves = [(torch.tensor(IDS[0]), tiny_batch(seed=1)), (torch.tensor(IDS[4]), tiny_batch(seed=2))]

    def outputs(module, ids, batch):
        return module(**batch, task_ids=ids).logits_per_image

    def gradients(found):
        model.zero_grad()
        sum(logits.pow(2).sum() for logits in found).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = [outputs(model, *half) for half in halves]
    expected_gradients, once = gradients(expected), usage(model)
    assert sum(counts.sum() for counts in once.values()) > 0
    replicas = [replica_of(model), replica_of(model)]
    found = in_threads([lambda r=r, h=h: outputs(r, *h) for r, h in zip(replicas, halves, strict=True)])
    assert all_equal(found, expected)
    for key, counts in usage(model).items():
        assert torch.equal(counts, 2 * once[key]), key
    found_gradients = gradients(found)
    assert found_gradients.keys() == expected_gradients.keys() and len(found_gradients) > 8
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- checkpointing and compilation


@both_forms
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_whole_call(form, reentrant):
    """Two calls of mixed tasks, prompts and all, then one backward pass: gradients as without, and counted once."""

    def gradients_and_usage(checkpointing):
        model = adapted(form, router_noise=0.0).double()
        model.set_task("b")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = 0
        for seed, ids in enumerate((IDS[0], IDS[1])):
            batch = tiny_batch(seed=seed)
            batch["pixel_values"] = batch["pixel_values"].double()
            loss = loss + model(**batch, task_ids=torch.tensor(ids)).logits_per_image.pow(2).sum()
        counted = usage(model)
        loss.backward()
        for key, counts in usage(model).items():
            assert torch.equal(counts, counted[key]), "recomputation must not count"
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counted

    (plain, counted), (checkpointed, counted_too) = gradients_and_usage(False), gradients_and_usage(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 8
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(counts, counted_too[key]) for key, counts in counted.items())


def compiled_and_not(model, batch, calls):
    """Call a model and its compiled form, with a task of its own for each call. Gives the values of both."""
    torch._dynamo.reset()
    compiled, seen = torch.compile(model, backend="eager"), []
    for task, ids in calls:
        model.set_task(task)
        task_ids = None if ids is None else torch.tensor(ids)
        with torch.no_grad():
            seen.append([module(**batch, task_ids=task_ids)[0] for module in (model, compiled)])
    for one, other in pairwise(seen):
        assert not torch.allclose(one[0], other[0])
    return zip(*seen, strict=True)


CALLS = [("a", None), ("b", None), ("b", IDS[0]), ("a", None)]


@both_forms
def test_a_compiled_tower_follows_its_tasks(form):
    values = {"target_modules": ["fc1", "fc2"], "layers_to_transform": [0]} if form == POOL else {}
    tower = adapted(form, CLIPVisionModel(tiny_clip().config.vision_config), **values)
    plain, compiled = compiled_and_not(tower, {"pixel_values": tiny_batch()["pixel_values"]}, CALLS)
    torch.testing.assert_close(compiled, plain)


@pytest.mark.slow
@both_forms
def test_a_compiled_clip_follows_its_tasks(form):
    model = adapted(form, **({"target_modules": ["fc1", "fc2"]} if form == POOL else {}))
    plain, compiled = compiled_and_not(model, tiny_batch(), [*CALLS, ("b", IDS[4]), (None, None)])
    torch.testing.assert_close(compiled, plain)


# ------------------------------------------------------------------------------------------- nothing is left behind


@both_forms
def test_contexts_that_disable_the_adapter_nest(form):
    model = adapted(form)
    model.set_task("c")
    expected = logits(model, IDS[0])
    with torch.no_grad():
        plain = tiny_clip()(**tiny_batch()).logits_per_image
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(logits(model, IDS[0]), plain)
        assert torch.equal(logits(model), plain), "the outer one still holds"
    assert torch.equal(logits(model, IDS[0]), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains != set()


@both_forms
def test_a_context_ends_with_a_call_that_fails(form):
    model = adapted(form)
    model.set_task("b")
    base, pixels = model.get_base_model(), tiny_batch()["pixel_values"]
    with torch.no_grad():
        expected = logits(model), base.vision_model(pixels).pooler_output, model.get_image_features(pixels)[1]

    def fail(module, args, output):
        raise InterruptedError("in the middle of a call")

    hook = base.vision_model.encoder.layers[1].register_forward_hook(fail)
    for call in (
        lambda: logits(model, IDS[0]),
        lambda: model.get_image_features(pixels, task_ids=torch.tensor(IDS[0])),
    ):
        with pytest.raises(InterruptedError):
            call()
    with pytest.raises(InterruptedError), model.route(torch.tensor(IDS[0])):
        base.vision_model(pixels)
    hook.remove()
    with torch.no_grad():
        found = logits(model), base.vision_model(pixels).pooler_output, model.get_image_features(pixels)[1]
    assert all_equal(found, expected)


# ------------------------------------------------------------------------------------------------------------- copies


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_forms
@pytest.mark.parametrize("how", [copy.deepcopy, saved_and_loaded])
def test_copies_route_by_their_own(form, how):
    model = adapted(form)
    model.set_task("a")
    expected = {task: logits(model) for task in TASKS if model.set_task(task) is None}
    mixed = logits(model, IDS[0])
    model.set_task("a")
    twin = how(model)
    twin.set_task("b")
    assert torch.equal(logits(twin), expected["b"]) and torch.equal(logits(model), expected["a"])
    model.set_task("c")
    assert torch.equal(logits(twin), expected["b"]) and torch.equal(logits(model), expected["c"])
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "moe_lora" in name:
                parameter.zero_()
    assert torch.equal(logits(model, IDS[0]), mixed) and not torch.equal(logits(twin, IDS[0]), mixed)
    twin.add_task("d")
    with pytest.raises(ValueError, match="3 tasks"):
        logits(model, [3, 0, 0, 0])
    logits(twin, [3, 0, 0, 0])


def test_the_class_of_an_adapted_model_makes_plain_ones(batch):
    model = adapted()
    base = model.get_base_model()
    made = type(base)(base.config)
    assert type(made) is CLIPModel and isinstance(base, CLIPModel)
    assert "task_ids" in inspect.signature(base.forward).parameters
    assert "task_ids" not in inspect.signature(made.forward).parameters
    assert made.state_dict().keys() == tiny_clip().state_dict().keys()
    made.load_state_dict(tiny_clip().state_dict())
    with torch.no_grad():
        assert torch.equal(made.eval()(**batch).logits_per_image, tiny_clip()(**batch).logits_per_image)


# ------------------------------------------------------------------------------------------------------------- shapes


@both_forms
@pytest.mark.parametrize("ids", IDS)
def test_shapes_do_not_depend_on_what_the_ids_are(form, ids):
    model = adapted(form)
    batch = tiny_batch()
    for name, fill in (("input_ids", 1), ("attention_mask", 0)):  # longer than any prompt needs
        batch[name] = nn.functional.pad(batch[name], (0, 7), value=fill)
    with torch.no_grad():
        output = model(**batch, task_ids=torch.tensor(ids))
    assert output.logits_per_image.shape == (4, 3) and output.logits_per_text.shape == (3, 4)
    assert output.text_embeds.shape == (4, 3, 16) and output.image_embeds.shape == (4, 16)
    assert output.text_model_output.last_hidden_state.shape == (3, 12, 24)
    assert output.vision_model_output.last_hidden_state.shape == (4, 5, 32)
    scores = torch.einsum("bp,bnp->bn", output.image_embeds, output.text_embeds)
    torch.testing.assert_close(output.logits_per_image, scores * model.get_base_model().logit_scale.exp())


# ------------------------------------------------------------------------------------------------------ other models


class Mine(nn.Module):
    """A model of one's own that contains a CLIP."""

    def __init__(self):
        super().__init__()
        self.clip = tiny_clip()
        torch.manual_seed(5)
        self.head = nn.Linear(16, 5)

    def forward(self, pixel_values, input_ids, attention_mask=None):
        output = self.clip(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return self.head(output.image_embeds), output.logits_per_image


@both_forms
@pytest.mark.parametrize("images", [4, 3])  # more images than prompts, and as many
def test_a_clip_inside_a_model_of_ones_own(form, images):
    values = {} if form == POOL else {"target_modules": ["mlp"]}
    model = adapted(form, Mine(), **values)
    batch, ids = tiny_batch(images), torch.tensor(IDS[0][:images])
    with torch.no_grad():
        alone = {}
        for index, task in [*enumerate(TASKS), (-1, None)]:
            model.set_task(task)
            alone[index] = model(**batch)
        plain = Mine().eval()(**batch)
        assert all_equal(alone[-1], plain)
        assert not torch.allclose(alone[0][0], alone[2][0])
        for positional in (False, True):
            inputs = ((batch["pixel_values"], batch["input_ids"], batch["attention_mask"]), {})
            args, kwargs = inputs if positional else ((), batch)
            mixed = model(*args, **kwargs, task_ids=ids)
            for row, task in enumerate(ids.tolist()):
                for found, expected in zip(mixed, alone[task], strict=True):
                    torch.testing.assert_close(found[row], expected[row])
        with pytest.raises(ValueError, match=f"2 entries for {images} images"):
            model(**batch, task_ids=torch.tensor([0, 1]))


def test_images_and_prompts_of_a_siglip_are_refused_with_the_way_out():
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 50, "max_position_embeddings": 8, "projection_size": 32}
    vision = {**size, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model = adapted(base=siglip, target_modules=r".*encoder\.layers\.\d+\.mlp\.fc[12]")
    pixels, prompts = torch.randn(4, 3, 16, 16), torch.randint(2, 50, (3, 8))
    ids = torch.tensor(IDS[0])
    with pytest.raises(ValueError, match=r"SiglipModel gets images and prompts.*towers one by one.*set_task\(name\)"):
        model(pixel_values=pixels, input_ids=prompts, task_ids=ids)
    # the ways out
    with torch.no_grad():
        towers = {}
        for index, task in [*enumerate(TASKS), (-1, None)]:
            model.set_task(task)
            towers[index] = model(pixel_values=pixels, input_ids=prompts)
        assert not torch.allclose(towers[0].image_embeds, towers[2].image_embeds)
        with model.route(ids):
            images = model.get_base_model().vision_model(pixel_values=pixels).pooler_output
        with model.route(torch.tensor([1, 0, 2])):
            texts = model.get_base_model().text_model(input_ids=prompts).pooler_output
    for row, task in enumerate(ids.tolist()):
        torch.testing.assert_close(images[row], towers[task].vision_model_output.pooler_output[row])
    for row, task in enumerate([1, 0, 2]):
        torch.testing.assert_close(texts[row], towers[task].text_model_output.pooler_output[row])


# --------------------------------------------------------------------------------------------- adapters added later


def test_an_adapter_added_to_a_model_in_eval_mode_is_in_eval_mode(tmp_path):
    noisy = {"router_noise": 5.0, "lora_dropout": 0.5}
    saved = adapted(**noisy)
    saved.save_pretrained(tmp_path)
    at_once = get_peft_model(tiny_clip(), config(**noisy))
    at_once.base_model.eval()
    randomize(at_once)
    added = adapted()
    added.add_adapter("other", config(**noisy))
    loaded = adapted()
    loaded.load_adapter(tmp_path, "other", is_trainable=True)
    for model in (added, loaded):
        model.set_adapter("other")
    randomize(added)
    for model in (at_once, added, loaded):
        expected = logits(model)
        assert torch.equal(logits(model), expected)
        assert not model.get_base_model().training
        assert any(p.requires_grad for name, p in model.named_parameters() if "moe_lora" in name)
        assert not any(counts.any() for counts in usage(model).values()), "nothing is counted outside of training"
    torch.testing.assert_close(logits(loaded), logits(saved))
    loaded.train()
    assert not torch.equal(logits(loaded), logits(loaded)), "and in training there is noise"
