"""Static merges against formulas written here."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from peft_moe_merge.model_merging.adaptation import Adaptation
from peft_moe_merge.model_merging.static import STATIC_MERGES, merge_static, static_merge

TASKS = ("cars", "dtd")


@pytest.fixture
def base():
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 32, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


@pytest.fixture
def finetuned(base):
    models = {}
    for seed, task in enumerate(TASKS, start=1):
        g = torch.Generator().manual_seed(seed)
        models[task] = copy.deepcopy(base)
        for name, parameter in models[task].named_parameters():
            if name.startswith("vision_model"):
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return models


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(3)
    return {
        "batches": {task: [torch.randn(6, 3, 16, 16, generator=g) for _ in range(3)] for task in TASKS},
        "heads": {task: F.normalize(torch.randn(4, 12, generator=g), dim=-1) for task in TASKS},
    }


def tau(base, finetuned, name):
    return torch.stack([m.get_parameter(name) - base.get_parameter(name) for m in finetuned.values()]).detach()


@pytest.mark.parametrize("method", STATIC_MERGES)
def test_every_merge_is_a_plain_model_and_leaves_its_inputs_alone(base, finetuned, data, method):
    before = {n: p.clone() for n, p in base.named_parameters()}
    options = data if method in ("fisher", "regmean", "adamerging") else {}
    if method == "adamerging":
        options = {**options, "how": Adaptation(2, lr=1e-3, schedule="constant"), "progress": False}
    merged = merge_static(base, finetuned, method, **options)
    assert type(merged) is CLIPModel and merged.state_dict().keys() == base.state_dict().keys()
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name])
        own = merged.get_parameter(name)
        assert own.isfinite().all()
        if name.startswith("vision_model"):
            assert not torch.equal(own, parameter) or tau(base, finetuned, name).abs().max() < 1e-9
        else:
            assert torch.equal(own, parameter)
    again = merge_static(base, finetuned, method, **options)
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", STATIC_MERGES)
def test_every_merge_in_every_precision_is_the_precise_one_rounded(base, finetuned, data, method, dtype):
    base, finetuned = base.to(dtype), {task: model.to(dtype) for task, model in finetuned.items()}
    options = dict(data) if "batches" in STATIC_MERGES[method].options else {}
    if method == "adamerging":
        options |= {"how": Adaptation(2, lr=1e-3, schedule="constant"), "progress": False}
    if method == "dare":
        options |= {"density": 1.0}  # what is drawn depends on the precision that it is drawn in
    if method == "fisher":
        options |= {"images": 4}
    merged = merge_static(base, finetuned, method, **options)
    exact = merge_static(
        copy.deepcopy(base).double(), {t: copy.deepcopy(m).double() for t, m in finetuned.items()}, method, **options
    )
    for name, parameter in merged.named_parameters():
        assert parameter.dtype == dtype and parameter.isfinite().all()
        expected = exact.get_parameter(name)
        change = (expected - base.get_parameter(name).double()).norm().item()
        rounding = torch.finfo(dtype).eps * (1 + expected.norm().item())
        slack = 0.3 if method in ("fisher", "regmean") else 0.05  # they ask the rounded models for their opinion
        assert (parameter.double() - expected).norm() <= rounding + (slack if dtype.itemsize < 4 else 1e-3) * change


def test_each_merge_names_its_source_and_new_ones_register(base, finetuned):
    assert all("arXiv" in merge.source and merge.name == name for name, merge in STATIC_MERGES.items())

    @static_merge("first", "nobody")
    def first(base, vectors, scaling: float = 1.0):
        """The first task's model."""
        return {n: vectors.base[n] + scaling * vectors.delta(vectors.tasks[0], n) for n in vectors.changed()}

    try:
        merged = merge_static(base, finetuned, "first")
        for name, parameter in finetuned["cars"].named_parameters():
            torch.testing.assert_close(merged.get_parameter(name), parameter)
        with pytest.raises(ValueError, match=r"'first' has the options \['scaling'\]; \['speed'\] are not"):
            merge_static(base, finetuned, "first", speed=1)
    finally:
        del STATIC_MERGES["first"]


def test_average_and_task_arithmetic(base, finetuned):
    for method, options, scaling in (("average", {}, 0.5), ("task_arithmetic", {"scaling": 0.4}, 0.4)):
        merged = merge_static(base, finetuned, method, **options)
        for name, parameter in base.named_parameters():
            expected = parameter + scaling * tau(base, finetuned, name).sum(0)
            torch.testing.assert_close(merged.get_parameter(name), expected)


def test_ties_keeps_large_changes_of_the_elected_sign(base, finetuned):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    merged = merge_static(base, finetuned, "ties", density=0.5, scaling=1.0)
    changes = tau(base, finetuned, name).flatten(1)
    kept = changes.shape[1] // 2
    for row in changes:
        row[row.abs().argsort(descending=True)[kept:]] = 0
    expected = torch.zeros(changes.shape[1])
    for i, column in enumerate(changes.T):
        elected = 1.0 if column.sum() >= 0 else -1.0
        agreeing = [float(value) for value in column if value * elected > 0]
        expected[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    actual = merged.get_parameter(name) - base.get_parameter(name)
    torch.testing.assert_close(actual.flatten(), expected, rtol=0, atol=1e-6)


def test_dare_is_unbiased_and_seeded(base, finetuned):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    draws = torch.stack(
        [
            merge_static(base, finetuned, "dare", density=0.5, scaling=1.0, seed=seed).get_parameter(name)
            - base.get_parameter(name)
            for seed in range(200)
        ]
    )
    expected = tau(base, finetuned, name).sum(0)
    assert not torch.equal(draws[0], draws[1])
    assert (draws.mean(0) - expected).norm() < 0.12 * expected.norm()  # 1 / sqrt(200), for one of two that is dropped


def test_iso_c_has_equal_singular_values(base, finetuned):
    merged = merge_static(base, finetuned, "iso_c", scaling=1.5)
    for name in (
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "vision_model.encoder.layers.0.self_attn.q_proj.weight",
    ):
        total = tau(base, finetuned, name).double().sum(0)
        change = (merged.get_parameter(name) - base.get_parameter(name)).double()
        mean = torch.linalg.svdvals(total).mean()
        torch.testing.assert_close(torch.linalg.svdvals(change), 1.5 * mean.expand(16), rtol=1e-3, atol=0)
        # of all matrices with these singular values the one with the largest product with the sum: the polar factor
        gram = total.T @ total
        values, vectors = torch.linalg.eigh(gram)
        polar = total @ (vectors * values.rsqrt()) @ vectors.T
        torch.testing.assert_close(change, 1.5 * mean * polar, rtol=0, atol=2e-5)
    bias = "vision_model.encoder.layers.0.mlp.fc1.bias"
    change = merged.get_parameter(bias) - base.get_parameter(bias)
    torch.testing.assert_close(change, 1.5 * tau(base, finetuned, bias).mean(0), rtol=1e-4, atol=1e-6)


def of_one_direction(base, name, left, right):
    """A fine-tuned copy whose weight changed by an outer product."""
    tuned = copy.deepcopy(base)
    tuned.get_parameter(name).data.add_(torch.outer(left, right))
    return tuned


def test_iso_c_adds_no_direction_that_nobody_learnt(base):
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    axes = torch.eye(32)[0], torch.eye(16)[3]
    merged = merge_static(base.double(), {"a": of_one_direction(base, name, *[x.double() for x in axes])}, "iso_c")
    change = merged.get_parameter(name) - base.get_parameter(name)
    torch.testing.assert_close(
        change, torch.outer(*axes).double() / 16, rtol=0, atol=1e-10
    )  # the mean of 1 and 15 zeros


def test_tsv_adds_orthogonal_tasks_up_and_parts_equal_ones(base, finetuned):
    base = base.double()
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    rows, columns = torch.eye(32).double(), torch.eye(16).double()
    apart = {t: of_one_direction(base, name, 3 * rows[i], columns[i]) for i, t in enumerate(TASKS)}
    change = merge_static(base, apart, "tsv").get_parameter(name) - base.get_parameter(name)
    expected = 3 * torch.outer(rows[0], columns[0]) + 3 * torch.outer(rows[1], columns[1])
    torch.testing.assert_close(change[:2, :2], expected[:2, :2], rtol=0, atol=1e-9)

    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    finetuned = {task: model.double() for task, model in finetuned.items()}
    merged = merge_static(base, finetuned, "tsv", scaling=0.7)
    kept_u, kept_s, kept_v = [], [], []
    for delta in tau(base, finetuned, name):  # 16 x 32: eight directions for each of two tasks
        u, s, vh = torch.linalg.svd(delta)
        kept_u, kept_s, kept_v = [*kept_u, *u.T[:8]], [*kept_s, *s[:8]], [*kept_v, *vh[:8]]

    def whitened(directions):  # X (Xᵀ X)^-½, by another way than a singular value decomposition
        x = torch.stack(directions, 1)
        values, vectors = torch.linalg.eigh(x.T @ x)
        return x @ (vectors * values.rsqrt()) @ vectors.T

    left, right = whitened(kept_u), whitened(kept_v)
    expected = sum(s * torch.outer(left[:, i], right[:, i]) for i, s in enumerate(kept_s))
    change = merged.get_parameter(name) - base.get_parameter(name)
    torch.testing.assert_close(change, 0.7 * expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.linalg.svdvals(change), 0.7 * torch.stack(kept_s).sort(descending=True).values)


def test_consensus_keeps_what_enough_tasks_have_a_use_for(base):
    name = "vision_model.encoder.layers.0.mlp.fc1.bias"
    changes = {  # of use to: both, none of them alone enough; the first alone; both though of opposite signs; nobody
        "cars": torch.tensor([1.0, 1.0, 1.0, 0.0]),
        "dtd": torch.tensor([1.0, 0.1, -0.8, 0.0]),
    }
    tuned = {}
    for task, change in changes.items():
        tuned[task] = copy.deepcopy(base)
        tuned[task].get_parameter(name).data[:4].add_(change)
    for tasks, kept in ((1, [1, 1, 1, 0]), (2, [1, 0, 1, 0])):
        merged = merge_static(base, tuned, "consensus", scaling=0.5, agreement=0.4, tasks=tasks)
        change = (merged.get_parameter(name) - base.get_parameter(name))[:4]
        expected = torch.tensor([0.5 * (a + b) * k for a, b, k in zip(*changes.values(), kept, strict=True)])
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="tasks=3 among 2 tasks"):
        merge_static(base, tuned, "consensus", tasks=3)


def test_consensus_is_a_loop_over_weights(base, finetuned):
    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    merged = merge_static(base, finetuned, "consensus", scaling=1.0)
    one, other = tau(base, finetuned, name).flatten(1)
    expected = [
        float(a + b) if abs(a) > 0.4 * abs(b) and abs(b) > 0.4 * abs(a) else 0.0
        for a, b in zip(one.tolist(), other.tolist(), strict=True)
    ]
    change = (merged.get_parameter(name) - base.get_parameter(name)).flatten()
    torch.testing.assert_close(change, torch.tensor(expected), rtol=0, atol=1e-6)
    assert 0.1 < (change == 0).float().mean() < 0.9


def test_fisher_weighs_by_squared_gradients(base, finetuned, data):
    """One image per task, classes so clear that the drawn one is certain up to chance: weigh by hand."""
    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    merged = merge_static(base, finetuned, "fisher", images=1, floor=1e-9, seed=0, **data)
    generator = torch.Generator().manual_seed(0)
    weighted, total = 0, 0
    for task, model in finetuned.items():
        model = copy.deepcopy(model)
        image = data["batches"][task][0][:1]
        features = F.normalize(model.get_image_features(pixel_values=image).pooler_output, dim=-1)
        p = (model.logit_scale.exp() * features @ data["heads"][task].T).softmax(-1)[0]
        label = torch.multinomial(p.detach(), 1, generator=generator)
        weight = torch.autograd.grad(p[label].log().sum(), model.get_parameter(name))[0] ** 2 + 1e-9
        weighted, total = weighted + weight * model.get_parameter(name), total + weight
    torch.testing.assert_close(merged.get_parameter(name), weighted / total, rtol=1e-4, atol=1e-6)


def test_regmean_is_the_least_squares_solution(base, finetuned, data):
    """Without damping the merged weight reproduces all layers' outputs better than any weight near it."""
    name = "vision_model.encoder.layers.0.mlp.fc1"
    merged = merge_static(base, finetuned, "regmean", off_diagonal=1.0, **data)
    inputs = {}
    for task, model in finetuned.items():
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0]))
        with torch.no_grad():
            for batch in data["batches"][task]:
                model.get_image_features(pixel_values=batch)
        handle.remove()
        inputs[task] = torch.cat(seen).flatten(0, 1).double()

    def error(weight):
        return sum(
            ((inputs[task] @ (weight - m.get_submodule(name).weight.double()).T) ** 2).sum()
            for task, m in finetuned.items()
        )

    weight = merged.get_submodule(name).weight.detach().double()
    stacked = torch.cat(list(inputs.values()))
    targets = torch.cat([inputs[t] @ m.get_submodule(name).weight.double().T for t, m in finetuned.items()])
    best = torch.linalg.lstsq(stacked, targets).solution.T
    assert error(weight).item() == pytest.approx(error(best).item(), rel=1e-4)
    average = sum(m.get_submodule(name).weight.double() for m in finetuned.values()) / 2
    assert error(weight) < 0.9 * error(average)
    bias = merged.get_submodule(name).bias
    torch.testing.assert_close(bias, sum(m.get_submodule(name).bias for m in finetuned.values()) / 2)


def test_adamerging_starts_at_task_arithmetic_and_lowers_entropy(base, finetuned, data):
    start = merge_static(base, finetuned, "adamerging", how=Adaptation(0), progress=False, **data)
    arithmetic = merge_static(base, finetuned, "task_arithmetic")
    for a, b in zip(start.parameters(), arithmetic.parameters(), strict=True):
        torch.testing.assert_close(a, b)

    @torch.no_grad()
    def entropy(model):
        total = 0.0
        for task in TASKS:
            features = F.normalize(
                model.get_image_features(pixel_values=torch.cat(data["batches"][task])).pooler_output, dim=-1
            )
            p = (model.logit_scale.exp() * features @ data["heads"][task].T).softmax(-1)
            total -= (p * p.log()).sum(-1).mean().item()
        return total

    how = Adaptation(20, lr=0.02, schedule="constant")
    learned = merge_static(base, finetuned, "adamerging", how=how, progress=False, **data)
    with pytest.warns(FutureWarning, match="settings as one: `Adaptation"):
        earlier = merge_static(base, finetuned, "adamerging", steps=20, lr=0.02, progress=False, **data)
    for a, b in zip(learned.parameters(), earlier.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="'entropy_with_prior' is for the gates of routers"):
        merge_static(base, finetuned, "adamerging", how=Adaptation(1, "entropy_with_prior"), **data)
    assert entropy(learned) < entropy(start) - 0.02
    # One coefficient per tensor and task: every change is a combination of that tensor's task vectors.
    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    change = (learned.get_parameter(name) - base.get_parameter(name)).detach().flatten()
    basis = tau(base, finetuned, name).flatten(1).T
    solution = torch.linalg.lstsq(basis, change[:, None]).solution
    torch.testing.assert_close((basis @ solution).flatten(), change, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("magic", {}, "no static merge 'magic'"),
        ("ties", {"densty": 0.2}, r"\['densty'\] are not among them"),
        ("fisher", {}, r"\['batches', 'heads'\] must be given"),
        ("fisher", {"batches": {"cars": []}, "heads": {}}, "lacks the tasks"),
        (
            "regmean",
            {"batches": {t: [] for t in TASKS}, "heads": dict.fromkeys(TASKS)},
            "no images of task 'cars'",
        ),
    ],
)
def test_bad_input_is_named(base, finetuned, method, options, message):
    with pytest.raises(ValueError, match=message):
        merge_static(base, finetuned, method, **options)


def test_models_that_do_not_fit_are_named(base):
    with pytest.raises(ValueError, match="'a' is not a copy"):
        merge_static(base, {"a": nn.Linear(2, 2)})
