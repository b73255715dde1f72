"""Every method over a short stream, and what sets each apart."""

# ruff: noqa: F401, F811 -- fixtures are imported

import copy
import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from small_methods import SETTINGS, disturb, logits_of, make, reference_distillation, run, some_batch, tasks

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.reference import load_reference
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.distillation import distillation_loss
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

NAMES = {
    "zero_shot",
    "finetune",
    "lora",
    "lora_per_task",
    "wise_ft",
    "lwf",
    "lwf_vr",
    "zscl",
    "icarl",
    "moe_adapters",
    "moe_lora_merge",
    "moe_lora_pool",
    "moe_lora_warm",
    "o_lora",
    "lora_soup",
    "magmax",
    "der_pp",
    "rail",
    "inflora",
    "coda_prompt",
    "sema",
    "slda",
    "lora_fused",
    "moe_lora_fused",
}
TRAINED = sorted(NAMES - {"zero_shot"})


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
    """Accuracies of two tasks that the small pretrained CLIP learns, few steps each."""
    pair = [
        replace(task, test=task.test.select(range(0, len(task.test), 4)))
        for task in load_suite("mini", ["aerial", "flowers"], few_shot=16)
    ]

    @functools.cache
    def matrix(name):
        settings = MethodSettings(full_lr=1e-3, exemplars=100, extra_batch_size=32)
        return run_stream(
            pair,
            lambda: METHODS[name](*load_clip(mini_clip_path()), settings),
            StreamSettings(steps=20, batch_size=32, lr=[3e-3]),
            tmp_path_factory.mktemp(name),
            Accelerator(cpu=True),
        ).matrix

    return matrix


# all of them ---------------------------------------------------------------------------------------------------------


def test_the_registry_has_all_names():
    assert set(METHODS) == NAMES


@pytest.mark.parametrize("name", TRAINED)
def test_runs_and_resumes_to_the_last_bit(name, run, tmp_path):
    count = (
        3
        if name in ("lora_per_task", "lora_fused", "o_lora", "lora_soup", "magmax", "inflora", "coda_prompt", "sema")
        else 2
    )  # there, two adapters have to come back
    straight = run(name, count=count)
    assert [len(row) for row in straight.matrix] == [count] * count
    assert len(straight.losses) == (count if METHODS[name].trains else 0)
    assert all(np.isfinite(losses).all() and len(losses) == 3 for losses in straight.losses)
    assert (straight.trainable_parameters > 0) == (name != "slda") and straight.stored_bytes > 0

    run(name, folder="resumed", count=count, stop_after=count - 1)
    resumed = run(name, folder="resumed", count=count, resume=True)
    assert (resumed.matrix, resumed.losses) == (straight.matrix, straight.losses)
    files = sorted((tmp_path / name).rglob("*.safetensors"))
    assert files
    for file in files:
        tensors, others = load_file(file), load_file(tmp_path / "resumed" / file.relative_to(tmp_path / name))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items())
    kinds = {path.suffix for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".md"}, "nothing that would need unpickling"


@pytest.mark.parametrize("name", list(METHODS))
def test_learning_rate(name, make):
    """Shared experts train at the stream's rate, LoRAs, pools and whole CLIPs at their own."""
    rates = {"full_lr": 2e-5, "lora_lr": 3e-5, "pool_lr": 5e-5, "inflora_lr": 6e-5, "coda_lr": 7e-5, "sema_lr": 8e-5}
    settings = MethodSettings(**rates, warm_lr=9e-5)
    expected = dict.fromkeys(METHODS, 2e-5)
    expected |= dict.fromkeys(("moe_adapters", "moe_lora_merge", "zero_shot", "rail", "slda"), 4e-3)
    expected |= dict.fromkeys(("lora", "lora_per_task", "lora_fused", "o_lora", "lora_soup", "magmax"), 3e-5) | {
        "moe_lora_pool": 5e-5,
        "moe_lora_warm": 9e-5,
        "moe_lora_fused": 9e-5,
        "inflora": 6e-5,
        "coda_prompt": 7e-5,
        "sema": 8e-5,
    }
    assert make(name, settings).learning_rate(4e-3) == expected[name]


@pytest.mark.parametrize("name", ["finetune", "wise_ft", "lwf", "lwf_vr", "zscl", "icarl", "der_pp"])
def test_methods_of_all_weights(name, make, tasks, tmp_path):
    method = make(name)
    scale = method.model.logit_scale.item()
    method.begin_task(tasks[0])
    trained = sum(parameter.numel() for parameter in method.trainable_parameters())
    assert trained == sum(parameter.numel() for parameter in method.model.parameters()) - 1, "all but the logit scale"
    disturb(method.model)
    method.end_task()
    method.save(tmp_path)
    loaded = make(name)
    loaded.load(tmp_path)
    for parameter, other in zip(method.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(parameter, other)
    assert loaded.model.logit_scale.item() == scale


def test_all_methods_see_the_same_images(run, monkeypatch):
    """Also those that draw random sentences, reference images or exemplars beside them."""
    seen = {}
    for name in ("finetune", "lwf_vr", "zscl", "icarl", "der_pp"):
        pixels = seen.setdefault(name, [])
        loss = METHODS[name].loss

        def record(self, model, batch, loss=loss, pixels=pixels):
            pixels.append(batch["pixel_values"].clone())
            return loss(self, model, batch)

        monkeypatch.setattr(METHODS[name], "loss", record)
        run(name, steps=2, count=2)
        monkeypatch.undo()
    first = seen.pop("finetune")
    assert len(first) == 4
    for name, pixels in seen.items():
        assert all(torch.equal(a, b) for a, b in zip(first, pixels, strict=True)), name


@pytest.mark.parametrize(
    "settings",
    [
        {"wise_alpha": 1.5},
        {"exemplars": 0},
        {"full_lr": 0.0},
        {"distillation_weight": -1.0},
        {"average_every": 0},
        {"lora_r": 0},
    ],
)
def test_settings_are_checked(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must"):
        MethodSettings(**settings)


# sequences -----------------------------------------------------------------------------------------------------------


def test_finetune_learns_and_forgets(learn):
    matrix, zero_shot = learn("finetune"), learn("zero_shot")[0]
    assert matrix[0][0] > zero_shot[0] + 10
    assert matrix[1][1] > matrix[0][1] + 10
    assert matrix[1][0] < matrix[0][0] - 10, "gone after another task"


def test_lora_trains_adapters_alone_and_one_for_all_tasks(make, tasks):
    method = make("lora")
    plain = {name: weight.clone() for name, weight in method.model.state_dict().items()}
    for task in tasks:
        method.begin_task(task)
        names = [name for name, weight in method.model.named_parameters() if weight.requires_grad]
        assert names and all("lora_" in name for name in names)
        towers, layers, linears, factors = 2, 3, 6, 2
        assert len(names) == towers * layers * linears * factors
    base = method.model.unload().state_dict()
    assert plain.keys() == base.keys() and all(torch.equal(weight, base[name]) for name, weight in plain.items())


def test_lora_per_task_forgets_nothing(learn):
    matrix, zero_shot = learn("lora_per_task"), learn("zero_shot")[0]
    assert matrix[0][0] > zero_shot[0] + 5 and matrix[1][1] > zero_shot[1] + 5
    assert matrix[0][1] == zero_shot[1], "plain CLIP for a task not learnt"
    assert matrix[1][0] == matrix[0][0], "kept exactly"


def test_lora_per_task_learns_only_the_newest_adapter(make, tasks):
    method = make("lora_per_task")
    counts = []
    for position, task in enumerate(tasks):
        method.begin_task(task)
        names = [name for name, weight in method.model.named_parameters() if weight.requires_grad]
        assert names and all(f".task_{position}." in name for name in names)
        counts.append(len(names))
        for other in tasks:  # testing in between must not change what is trained next
            method.prepare_evaluation(other)
    assert len(set(counts)) == 1


def test_replay_forgets_less(learn):
    replay, sequential = learn("icarl"), learn("finetune")
    assert replay[0][0] == sequential[0][0], "the first task is the same"
    assert replay[1][0] > sequential[1][0] + 5


def test_moe_adapters_is_ours_without_merging(run):
    adapters = run("moe_adapters", count=2)
    assert [of_task["merges"] for of_task in adapters.history] == [[], []]
    never = MethodSettings(**{**vars(SETTINGS), "merge_every": 1000})
    unmerged = run("moe_lora_merge", folder="unmerged", settings=never, count=2)
    assert (adapters.matrix, adapters.losses) == (unmerged.matrix, unmerged.losses)
    assert adapters.history == unmerged.history
    assert run("moe_lora_merge", count=2).losses != adapters.losses
    assert all(len(frozen) >= SETTINGS.freeze_top_k for frozen in adapters.history[0]["frozen"].values())


# weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_wise_ft_interpolates(make, tasks, alpha):
    method = make("wise_ft", MethodSettings(**{**vars(SETTINGS), "wise_alpha": alpha}))
    for seed, task in enumerate(tasks):
        before = copy.deepcopy(method.model.state_dict())
        method.begin_task(task)
        disturb(method.model, seed)
        after = copy.deepcopy(method.model.state_dict())
        method.end_task()
        for name, weight in method.model.state_dict().items():
            expected = (1 - alpha) * before[name].double() + alpha * after[name].double()
            torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [6, 7, 1])
def test_zscl_averages_the_weights_of_a_task(make, tasks, steps):
    method = make("zscl")
    method.begin_task(tasks[0])
    kept = [copy.deepcopy(method.model.state_dict())]
    for step in range(1, steps + 1):
        disturb(method.model, step)
        method.after_step(None)
        if step % SETTINGS.average_every == 0 or step == steps:
            kept.append(copy.deepcopy(method.model.state_dict()))
    method.end_task()
    for name, weight in method.model.state_dict().items():
        mean = torch.stack([weights[name].double() for weights in kept]).mean(dim=0)
        torch.testing.assert_close(weight.double(), mean, atol=1e-6, rtol=0)


# distillation --------------------------------------------------------------------------------------------------------


def test_distillation_loss_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    loss = distillation_loss(student, teacher)
    assert loss.item() == pytest.approx(reference_distillation(student, teacher), rel=1e-5)
    assert distillation_loss(student, student + 3.0).item() == pytest.approx(0, abs=1e-6), "softmax ignores a shift"
    assert distillation_loss(student, teacher) != distillation_loss(teacher, student)

    # its gradient is that of LwF's cross-entropy with softened targets
    gradients = []
    for objective in (
        lambda x: distillation_loss(x, teacher),
        lambda x: 4 * F.cross_entropy(x / 2, (teacher / 2).softmax(-1)),
    ):
        logits = student.clone().requires_grad_()
        objective(logits).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_lwf_distils_from_the_model_before_the_task(make, tasks):
    weight = 0.7
    method = make("lwf", MethodSettings(distillation_weight=weight))
    batch = some_batch()
    method.begin_task(tasks[0])
    plain = METHODS["finetune"].loss(method, method.model, batch)
    assert method.loss(method.model, batch).item() == pytest.approx(plain.item()), "nothing to distil yet"
    disturb(method.model, 1)
    method.end_task()

    before = copy.deepcopy(method.model)
    method.begin_task(tasks[1])
    assert method.loss(method.model, batch).item() == pytest.approx(
        METHODS["finetune"].loss(method, method.model, batch).item(), abs=1e-5
    ), "nothing has moved yet"
    disturb(method.model, 2)
    earlier = tasks[0].prompts(tasks[0].templates[0])
    student, teacher = (logits_of(method, model, batch["pixel_values"], earlier) for model in (method.model, before))
    own = logits_of(method, method.model, batch["pixel_values"], tasks[1].prompts(tasks[1].templates[0]))
    expected = F.cross_entropy(own, batch["labels"], label_smoothing=0.2) + weight * reference_distillation(
        student, teacher
    )
    loss = method.loss(method.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    method.end_task()
    method.begin_task(tasks[2])
    assert method.distilled_texts() == earlier + tasks[1].prompts(tasks[1].templates[0])


def test_lwf_vr_distils_on_random_sentences(make, tasks, monkeypatch):
    method = make("lwf_vr")
    before = copy.deepcopy(method.model)
    torch.manual_seed(11)
    method.begin_task(tasks[0])
    first, second = method.distilled_texts(), method.distilled_texts()
    assert len(first) == SETTINGS.extra_batch_size and first != second, "others at each step"
    special = method.processor.tokenizer.all_special_tokens
    assert all(word.isalpha() and word not in special for text in first for word in text.split())
    torch.manual_seed(11)
    again = make("lwf_vr")
    torch.manual_seed(11)
    again.begin_task(tasks[0])
    assert again.distilled_texts() == first, "of the seed"

    disturb(method.model)
    monkeypatch.setattr(method, "distilled_texts", lambda: first)
    batch = some_batch()
    student, teacher = (logits_of(method, model, batch["pixel_values"], first) for model in (method.model, before))
    own = logits_of(method, method.model, batch["pixel_values"], tasks[0].prompts(tasks[0].templates[0]))
    expected = F.cross_entropy(own, batch["labels"], label_smoothing=0.2) + reference_distillation(student, teacher)
    assert method.loss(method.model, batch).item() == pytest.approx(expected.item(), rel=1e-4)


def test_zscl_distils_both_ways_from_the_original_clip(make, tasks):
    weight = 0.6
    method = make("zscl", MethodSettings(**{**vars(SETTINGS), "distillation_weight": weight}))
    original = copy.deepcopy(method.model)
    disturb(method.model, 1)  # earlier tasks
    method.begin_task(tasks[0])
    disturb(method.model, 2)
    draws = copy.deepcopy(method.generator)
    batch = some_batch()
    loss = method.loss(method.model, batch)

    images, sentences = method.reference.images, method.reference.sentences
    rows, said = (torch.randperm(len(of), generator=draws)[:8].tolist() for of in (images, sentences))
    assert len(set(rows)) == len(set(said)) == 8
    pixels = method.processor.image_processor([images[row]["image"] for row in rows], return_tensors="pt")
    texts = [sentences[row] for row in said]
    student, teacher = (logits_of(method, model, pixels["pixel_values"], texts) for model in (method.model, original))
    own = logits_of(method, method.model, batch["pixel_values"], tasks[0].prompts(tasks[0].templates[0]))
    expected = F.cross_entropy(own, batch["labels"], label_smoothing=0.2) + weight * (
        reference_distillation(student, teacher) + reference_distillation(student.T, teacher.T)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


# reference set -------------------------------------------------------------------------------------------------------


def test_the_reference_set_of_drawings():
    reference, again = load_reference("mini"), load_reference("mini")
    assert len(reference.images) > 1000 and len(set(reference.sentences)) == len(reference.sentences) > 1000
    assert reference.images[5]["image"].mode == "RGB" and reference.images[5]["image"].size == (32, 32)
    assert reference.sentences == again.sentences
    assert np.array_equal(reference.images[7]["image"], again.images[7]["image"])


def test_a_folder_as_reference_set(tmp_path, make):
    for name in ("old_barn", "pier"):
        (tmp_path / name).mkdir()
        for index in range(6):
            Image.new("RGB", (40, 32), (index * 40, 0, 0)).save(tmp_path / name / f"{index}.png")
    reference = load_reference(str(tmp_path))
    assert len(reference.images) == 12 and reference.sentences == ["a photo of a old barn.", "a photo of a pier."]
    with pytest.raises(FileNotFoundError, match="No reference images in .*'mini'"):
        make("zscl", MethodSettings(reference=str(tmp_path / "nothing")))
