"""The expert pool: every task has experts of its own, the pool grows, and old experts merge where it may not."""

import copy
import math
import re

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import PeftModel, get_peft_model
from torch import nn

from peft_moe_merge import MoELoraMergeConfig
from peft_moe_merge.tuners.moe_lora_merge.optimizer import loraplus_groups
from peft_moe_merge.tuners.moe_lora_merge.pool import favourites, most_alike, product

IN, HIDDEN, OUT = 6, 10, 5
WIDTHS = {"first": (IN, HIDDEN), "second": (HIDDEN, OUT)}


class Net(nn.Module):
    """Two linear layers, called by keyword as a model of transformers would be."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net_pool(tasks=("a", "b", "c"), learnt=True, **fields):
    torch.manual_seed(0)
    fields = {"r": 3, "lora_alpha": 2.0, "target_modules": ["first", "second"], **fields}
    model = get_peft_model(Net(), MoELoraMergeConfig.pool(tasks=list(tasks), **fields)).double()
    if learnt:
        randomize(model)
    return model


def clip_pool(tasks=("a", "b"), learnt=True, **fields):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), MoELoraMergeConfig.pool(tasks=list(tasks), **{"r": 2, **fields})).train()
    if learnt:
        randomize(model)
    return model


def config_of(model):
    return model.peft_config["default"]


def inputs(*shape, seed=0):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def images_of(model, task, seed=50):
    """What a task makes of some images, in evaluation."""
    mode, current = model.training, model.current_task
    model.eval()
    model.set_task(task)
    with torch.no_grad():
        logits = model(**tiny_batch(seed=seed)).logits_per_image
    model.set_task(current)
    model.train(mode)
    return logits


def train(model, task, steps=4, optimizer=None):
    model.set_task(task)
    model.train()
    optimizer = optimizer or torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.5)
    for step in range(steps):
        logits = model(**tiny_batch(images=4, seed=step)).logits_per_image
        nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()


def all_tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------- forward and backward, told slowly


class Slow:
    """The adapted `Net`, one sample, one expert at a time, from copies of all weights."""

    def __init__(self, model):
        self.config, self.known = config_of(model), {}
        self.weights, self.actual = {}, {}
        for task in self.config.tasks:
            self.known[task] = model.experts_of_task(task)
        base = model.get_base_model()
        self.base = {block: getattr(base, block).get_base_layer() for block in WIDTHS}
        for block, bank in model.expert_banks().items():
            for name in ("down_weight", "up_weight", "down_bias", "up_bias"):
                for expert, parameter in enumerate(getattr(bank, name, ())):
                    self.keep((block, name, expert), parameter)
        for block, bank in model.router_banks().items():
            for index, task in enumerate(self.config.tasks):
                self.keep((block, "router", task), bank.weight[index])

    def keep(self, key, parameter):
        self.actual[key], self.weights[key] = parameter, parameter.detach().clone().requires_grad_()

    def expert(self, block, expert, x):
        weights = self.weights
        hidden = weights[block, "down_weight", expert] @ x
        if self.config.expert_activation != "identity":
            hidden = hidden + weights[block, "down_bias", expert]
            hidden = getattr(nn.functional, self.config.expert_activation)(hidden)
        y = weights[block, "up_weight", expert].T @ hidden
        return y if self.config.expert_activation == "identity" else y + weights[block, "up_bias", expert]

    def token(self, block, task, x, decides):
        y = self.base[block].weight @ x + self.base[block].bias
        if task is None:
            return y
        scores = decides @ self.weights[block, "router", task]
        best = sorted(range(len(scores)), key=lambda column: -scores[column].item())[: self.config.top_k]
        total = sum(scores[column].exp() for column in best)
        root = math.sqrt(self.config.r) if self.config.use_rslora else self.config.r
        for column in best:
            expert = self.known[task][block][column]
            y = y + self.config.lora_alpha / root * scores[column].exp() / total * self.expert(block, expert, x)
        return y

    def layer(self, block, task, x):
        if x.ndim == 1:
            return self.token(block, task, x, x)
        own = self.config.routing == "token"
        return torch.stack([self.token(block, task, token, token if own else x[0]) for token in x])

    def __call__(self, x, tasks):
        rows = []
        for sample, task in zip(x, tasks, strict=True):
            rows.append(self.layer("second", task, torch.tanh(self.layer("first", task, sample))))
        return torch.stack(rows)


def check_against_slow(model, x, task_ids=None):
    slow = Slow(model)
    names = config_of(model).tasks
    ids = [names.index(model.current_task)] * len(x) if task_ids is None else task_ids
    tasks = [None if index < 0 else names[index] for index in ids]
    x, x_slow = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = model(x) if task_ids is None else model(x, task_ids=torch.tensor(task_ids))
    expected = slow(x_slow, tasks)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    torch.manual_seed(3)
    direction = torch.randn_like(expected)
    (got * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, x_slow.grad, rtol=0, atol=1e-10)
    compared = 0
    for key, parameter in slow.actual.items():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        wanted = slow.weights[key].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key}: {text}")
        compared += bool(wanted.any())
    model.zero_grad()
    # something of the current task's must have been compared, if a sample was its own
    assert compared or model.current_task not in tasks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(5,), (5, 4)])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 3), (3, 1), (3, 2)])
def test_outputs_and_gradients_are_those_of_the_slow_sum(per_task, top_k, shape, training):
    model = net_pool(experts_per_task=per_task, top_k=top_k).train(training)
    for task in ("a", "c"):
        model.set_task(task)
        check_against_slow(model, inputs(*shape))
        check_against_slow(model, inputs(*shape), [2, -1, 0, 2, 1])
        check_against_slow(model, inputs(*shape), [1] * 5)
        check_against_slow(model, inputs(*shape), [-1] * 5)


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"expert_activation": "gelu", "merge_strategy": "average"}])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_other_scales_and_activations(per_task, top_k, fields):
    model = net_pool(experts_per_task=per_task, top_k=top_k, **fields)
    check_against_slow(model, inputs(5, 4))
    check_against_slow(model, inputs(5, 4), [2, -1, 0, 2, 1])


@pytest.mark.parametrize("shape", [(5,), (5, 4)])
@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_tokens_decide_for_themselves(per_task, top_k, shape):
    model = net_pool(experts_per_task=per_task, top_k=top_k, routing="token")
    check_against_slow(model, inputs(*shape))
    check_against_slow(model, inputs(*shape), [2, -1, 0, 2, 1])


@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_two_columns_may_lead_to_one_expert(top_k, routing):
    model = net_pool(experts_per_task=3, top_k=top_k, routing=routing)
    model.train()
    model(inputs(8, 2, seed=5))
    merges = model.merge_experts()
    assert merges.keys() == WIDTHS.keys()
    for block, known in model.experts_of_task("a").items():
        assert len(known) == 3 and len(set(known)) == 2
        assert merges[block].second not in known and merges[block].target == merges[block].first
    check_against_slow(model, inputs(5, 4))
    check_against_slow(model, inputs(5), [2, -1, 0, 2, 0])
    # with every column in the sum, nothing is left to choose; down to one expert the router has no say at all
    model.merge_experts()
    assert all(len(set(known)) == 1 for known in model.experts_of_task("a").values())
    check_against_slow(model, inputs(5, 4))


def test_tasks_of_different_widths_in_one_batch():
    model = net_pool(tasks=["a"], num_experts="grow", task_experts="shared", merge_routing="keep", merge_at="steps")
    model.freeze_experts(0)
    model.train()
    model(inputs(5, 4))
    model.freeze_experts(2)
    model.add_task("b")
    assert {block: len(known) for block, known in model.experts_of_task("b").items()} == dict.fromkeys(WIDTHS, 4)
    randomize(model)
    model.set_task("b")
    check_against_slow(model, inputs(5, 4), [1, 0, 1, -1, 1])


# ----------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("experts", [1, 2, 3])
def test_routers_store_their_own_columns_alone(experts):
    T, r = 4, 3
    model = net_pool(tasks=[f"t{task}" for task in range(T)], experts_per_task=experts, top_k=experts, r=r)
    in_pool = {name: parameter for name, parameter in model.named_parameters() if "moe_lora_" in name}
    per_task = sum(experts * r * (D + O) + D * experts for D, O in WIDTHS.values())  # noqa: E741
    assert sum(parameter.numel() for parameter in in_pool.values()) == T * per_task
    assert sum(parameter.numel() for parameter in trainable(model).values()) == per_task - (
        sum(D for D, _ in WIDTHS.values()) if experts == 1 else 0  # a softmax over one score is 1: nothing to learn
    )
    model.add_task("later")
    assert all(len(bank) == (T + 1) * experts for bank in model.expert_banks().values())
    for block, (D, _) in WIDTHS.items():
        for task in ("t0", "later"):
            assert {name: tuple(w.shape) for name, w in model.router_parameters(block, task).items()} == {
                "weight": (D, experts)
            }
    assert not any("noise" in name for name in model.state_dict())


def test_without_noise_training_and_evaluation_agree():
    model = net_pool(experts_per_task=3, top_k=2)
    x, ids = inputs(5, 4), torch.tensor([0, 1, -1, 2, 2])
    trained, mixed = model.train()(x), model(x, task_ids=ids)
    assert torch.equal(model.eval()(x), trained) and torch.equal(model(x, task_ids=ids), mixed)
    noisy = net_pool(experts_per_task=3, top_k=2, router_noise=0.5).train()
    assert any("noise_weight" in name for name in noisy.state_dict())
    assert not torch.equal(noisy(x), noisy(x))


# ------------------------------------------------------------------------------------- one task leaves others alone


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (2, 1)])
def test_training_a_task_changes_no_output_of_another(per_task, top_k):
    model = clip_pool(["a", "b", "c"], experts_per_task=per_task, top_k=top_k)
    pool = [parameter for name, parameter in model.named_parameters() if "moe_lora_" in name]
    # one optimizer with all of the pool, and momentum of the task before: the worst there is
    optimizer = torch.optim.AdamW(pool, lr=1e-2, weight_decay=0.5)
    train(model, "a", optimizer=optimizer)
    a, b, c = (images_of(model, task) for task in "abc")
    train(model, "b", optimizer=optimizer)
    assert torch.equal(images_of(model, "a"), a) and torch.equal(images_of(model, "c"), c)
    assert not torch.equal(images_of(model, "b"), b)


def test_own_experts_and_router_train_and_nothing_else():
    model = net_pool()
    for task in ("b", None, "c", "a"):
        model.set_task(task)
        expected = set()
        for block in WIDTHS if task else ():
            expected |= {
                id(p) for e in model.experts_of_task(task)[block] for p in model.expert_banks()[block].parameters_of(e)
            }
            index = config_of(model).tasks.index(task)
            expected |= {id(model.router_banks()[block].weight[index])}
        assert {id(parameter) for parameter in trainable(model).values()} == expected
    own = [set(model.experts_of_task(task)["first"]) for task in "abc"]
    assert not own[0] & own[1] and not own[0] & own[2] and not own[1] & own[2]


@pytest.mark.parametrize("per_task", [1, 2, 3])
def test_every_trainable_parameter_gets_a_gradient(per_task):
    model = clip_pool(experts_per_task=per_task, top_k=per_task)
    for merged in (False, True):
        model.set_task("b")
        model(**tiny_batch()).logits_per_image.sin().sum().backward()
        without = [name for name, parameter in trainable(model).items() if parameter.grad is None]
        assert trainable(model) and not without, without[:3]
        model.zero_grad()
        if not merged and per_task > 1:
            assert model.merge_experts()


def test_usage_counts_rows_and_prompts():
    model = clip_pool(["a", "b"])
    model(**tiny_batch(images=4))
    model(**tiny_batch(images=4), task_ids=torch.tensor([0, -1, 1, 0]))
    model.eval()
    model(**tiny_batch(images=4))
    for block, counts in model.expert_usage("a").items():
        rows = 3 + 3 if block.startswith("text_model") else 4 + 2  # prompts are encoded once for each task there is
        own = model.experts_of_task("a")[block]
        assert counts.tolist() == [rows if expert in own else 0 for expert in range(4)]
    assert {c.sum().item() for name, c in model.expert_usage("b").items() if name.startswith("vision")} == {2 * 1}


# ------------------------------------------------------------------------------------------------------------ growth


def test_the_pool_grows_with_its_tasks_and_nothing_moves():
    model = clip_pool(["a"], learnt=False, r=1, experts_per_task=1, top_k=1, target_modules=["fc1"])
    train(model, "a", steps=2)
    first, plain = images_of(model, "a"), images_of(model, None)
    assert not torch.equal(first, plain)
    for step in range(49):
        model.add_task(f"t{step}")
        assert torch.equal(images_of(model, f"t{step}"), plain)  # new experts add nothing yet
        train(model, f"t{step}", steps=1)
        assert torch.equal(images_of(model, "a"), first), step
    assert all(len(bank) == 50 for bank in model.expert_banks().values())
    assert len(config_of(model).tasks) == 50 and config_of(model).pool_size == 50


def fill(model):
    """Train on random inputs so that selections are counted; weights stay."""
    for task in config_of(model).tasks:
        model.set_task(task)
        model.train()
        model(inputs(4))


@pytest.mark.parametrize("bound", [{"max_experts": 5}, {"num_experts": 5}])
def test_a_full_pool_refuses_and_names_the_way_out(bound):
    model = net_pool(["a", "b"], merge_at="steps", **bound)
    fill(model)
    before, config = all_tensors(model), config_of(model).to_dict()
    trains = set(trainable(model))
    with pytest.raises(ValueError, match=r"pool is full.*num_experts='grow'.*merge_at='pool_full'"):
        model.add_task("c")
    assert same_tensors(all_tensors(model), before) and config_of(model).to_dict() == config
    assert set(trainable(model)) == trains
    # the advised ways
    for way in ({"num_experts": "grow"}, {**bound, "merge_at": "pool_full"}):
        model = net_pool(["a", "b"], **{"merge_at": "steps", **way})
        model.add_task("c")
        model.set_task("c")
        check_against_slow(model, inputs(3))


@pytest.mark.parametrize("bound", [{"max_experts": 5}, {"num_experts": 5}])
def test_a_full_pool_merges_its_most_alike_pair(bound):
    model = net_pool(["a", "b"], **bound)
    fill(model)
    with torch.no_grad():  # expert 1 of a and expert 2 of b are nearly one update, in other bases
        for bank in model.expert_banks().values():
            torch.manual_seed(7)
            basis = torch.randn(3, 3, dtype=torch.float64)
            bank.down_weight[2].copy_(basis @ bank.down_weight[1])
            bank.up_weight[2].copy_(torch.linalg.inv(basis).T @ bank.up_weight[1] * 1.01)
    updates = {
        block: [bank.expert(e)["up_weight"].T @ bank.expert(e)["down_weight"] for e in range(len(bank))]
        for block, bank in model.expert_banks().items()
    }
    model.add_task("c")  # needs two, finds the one that grew or was left, and makes the other
    for block, bank in model.expert_banks().items():
        assert len(bank) == 5
        assert model.experts_of_task("a")[block] == [0, 1] and model.experts_of_task("b")[block] == [1, 3]
        assert sorted(model.experts_of_task("c")[block]) == [2, 4]
        union = bank.expert(1)["up_weight"].T @ bank.expert(1)["down_weight"]
        torch.testing.assert_close(union, (updates[block][1] + updates[block][2]) / 2)
        for expert in (2, 4) if "max_experts" in bound else (2,):  # the tests gave weights to one that nobody had yet
            assert not bank.up_weight[expert].any() and bank.down_weight[expert].any()
        for expert in (0, 3):  # the others stay
            torch.testing.assert_close(bank.up_weight[expert].T @ bank.down_weight[expert], updates[block][expert])
        assert model.expert_usage("a")[block].tolist() == [4, 4, 0, 0, 0]
        assert model.expert_usage("b")[block].tolist() == [0, 4, 0, 4, 0]
    model.set_task("c")
    assert all(model.expert_banks()["first"].up_weight[expert].requires_grad for expert in (2, 4))
    check_against_slow(model, inputs(4), [0, 1, 2, -1])


def test_a_freed_place_is_trainable_though_its_expert_was_frozen():
    model = net_pool(["a", "b"], num_experts=4)
    for task in ("a", "b"):
        model.set_task(task)
        model.train()
        model(inputs(4))
        model.freeze_experts(2)
    assert model.frozen_experts() == {block: [0, 1, 2, 3] for block in WIDTHS}
    model.add_task("c")
    for block, known in model.experts_of_task("c").items():
        assert len(known) == 2 and not set(known) & set(model.frozen_experts()[block])
        assert len(model.frozen_experts()[block]) == 2
    model.set_task("c")
    outputs = [model.eval()(inputs(4), task_ids=torch.full((4,), task)) for task in (0, 1)]
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        model.train()(inputs(4)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    for task, output in enumerate(outputs):
        assert torch.equal(model(inputs(4), task_ids=torch.full((4,), task)), output)


def test_a_long_stream_fits_into_a_bounded_pool():
    model = net_pool(["t0"], max_experts=5)
    for step in range(1, 9):
        model.add_task(f"t{step}")
        model.set_task(f"t{step}")
        for parameter in trainable(model).values():
            nn.init.normal_(parameter)
        assert all(len(bank) <= 5 for bank in model.expert_banks().values())
        own = model.experts_of_task(f"t{step}")["first"]
        others = {e for task in range(step) for e in model.experts_of_task(f"t{task}")["first"]}
        assert len(set(own)) == 2 and not set(own) & others
    check_against_slow(model, inputs(10), [*range(9), -1])


def test_untrained_experts_make_room_as_well():
    model = net_pool(["a", "b"], learnt=False, num_experts=4)
    plain = model(inputs(3))
    model.add_task("c")
    assert torch.equal(model(inputs(3)), plain)
    assert all(len(set(known)) == 2 for known in model.experts_of_task("c").values())


def test_a_pool_for_one_task_alone_cannot_make_room():
    model = net_pool(["a"], max_experts=2)
    before, config = all_tensors(model), config_of(model).to_dict()
    with pytest.raises(ValueError, match="pool is full.*max_experts"):
        model.add_task("b")
    assert same_tensors(all_tensors(model), before) and config_of(model).to_dict() == config
    # one place more and it can
    model = net_pool(["a"], max_experts=3)
    model.add_task("b")
    check_against_slow(model, inputs(4), [0, 1, 0, 1])


# ----------------------------------------------------------------------------------------------- the union's weights


def an_expert(seed, r=3, D=7, O=5):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    return {
        "down_weight": torch.randn(r, D, generator=generator, dtype=torch.float64),
        "up_weight": torch.randn(r, O, generator=generator, dtype=torch.float64),
    }


def update(expert):
    return expert["down_weight"].T @ expert["up_weight"]


def truncated(matrix, rank):
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


@pytest.mark.parametrize("share", [0.5, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("r, D, O", [(3, 7, 5), (2, 4, 9), (4, 5, 4), (1, 6, 6), (5, 3, 4)])
def test_product_is_the_best_of_its_rank(r, D, O, share):  # noqa: E741
    first, second = an_expert(1, r, D, O), an_expert(2, r, D, O)
    union = product(first, second, share)
    assert all(union[name].shape == first[name].shape for name in first)
    best = truncated(share * update(first) + (1 - share) * update(second), r)
    torch.testing.assert_close(update(union), best, rtol=0, atol=1e-10)


def test_product_does_not_depend_on_the_bases():
    first, second = an_expert(1), an_expert(2)
    torch.manual_seed(0)
    turned = []
    for expert in (first, second):
        basis = torch.randn(3, 3, dtype=torch.float64)
        turned.append(
            {
                "down_weight": basis @ expert["down_weight"],
                "up_weight": torch.linalg.inv(basis).T @ expert["up_weight"],
            }
        )
    torch.testing.assert_close(update(product(*turned, 0.3)), update(product(first, second, 0.3)))


def test_a_merge_weighs_by_usage():
    model = net_pool(["a"], experts_per_task=2, top_k=1)
    model.train()
    for seed in range(3):
        model(inputs(16, seed=seed))
    before = {block: [bank.expert(e) for e in range(2)] for block, bank in model.expert_banks().items()}
    before, usage = copy.deepcopy(before), model.expert_usage()
    merges = model.merge_experts()
    for block, merge in merges.items():
        share = usage[block][0].item() / 48
        assert 0 < share < 1 and share != 0.5
        full = share * update(before[block][0]) + (1 - share) * update(before[block][1])
        union = update(model.expert_banks()[block].expert(merge.target))
        torch.testing.assert_close(union, truncated(full, 3), rtol=0, atol=1e-10)


def test_most_alike_looks_at_updates_not_at_factors():
    experts = [an_expert(seed) for seed in range(4)]
    experts[3] = {
        "down_weight": experts[1]["down_weight"][[2, 0, 1]] * 5,
        "up_weight": experts[1]["up_weight"][[2, 0, 1]],
    }
    assert most_alike([0, 1, 2, 3], experts.__getitem__) == (1, 3)
    assert most_alike([2], experts.__getitem__) is None


def test_favourites_are_a_tasks_own():
    usage = torch.tensor([9, 8, 7, 2, 1, 0])
    assert favourites(usage, 2) == [0, 1]
    assert favourites(usage, 2, own=[3, 4]) == [3, 4] and favourites(usage, 1, own=[3, 4]) == [3]
    assert favourites(usage, 2, own=[4, 5]) == [4]
    model = net_pool(["a", "b"])
    for routers in model.router_banks().values():
        routers.usage[1] = torch.tensor([9, 8, 1, 2])
    assert model.freeze_experts(2, task="b") == {block: [2, 3] for block in WIDTHS}
    assert model.freeze_experts(1, task="b") == {block: [] for block in WIDTHS}


# ---------------------------------------------------------------------------------------------------- saving, baking


def saved_states():
    grown = clip_pool(["a"])
    grown.add_task("b")
    randomize(grown)
    redirected = clip_pool(["a", "b"], experts_per_task=3, top_k=2)
    redirected(**tiny_batch())
    redirected.merge_experts()
    bounded = clip_pool(["a", "b"], max_experts=4)
    bounded.add_task("c")
    fixed = clip_pool(["a", "b"], num_experts=4)
    fixed.add_task("c")
    frozen = clip_pool(["a", "b"])
    frozen(**tiny_batch())
    frozen.freeze_experts(1)
    return {"grown": grown, "redirected": redirected, "bounded": bounded, "fixed": fixed, "frozen": frozen}


@pytest.mark.parametrize("state", ["grown", "redirected", "bounded", "fixed", "frozen"])
def test_a_saved_pool_comes_back(state, tmp_path):
    model = saved_states()[state]
    tasks = config_of(model).tasks
    model.save_pretrained(tmp_path)
    for is_trainable in (False, True):
        loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path, is_trainable=is_trainable)
        for task in [*tasks, None]:
            assert torch.equal(images_of(loaded, task), images_of(model, task)), task
        assert loaded.frozen_experts() == model.frozen_experts()
        for task in tasks:
            assert loaded.experts_of_task(task) == model.experts_of_task(task)
            usage = model.expert_usage(task)
            assert all(torch.equal(counts, usage[block]) for block, counts in loaded.expert_usage(task).items())
    assert set(trainable(loaded)) == set(trainable(model))
    # and the stream goes on, in the loaded model as in this one
    for one in (model, loaded):
        torch.manual_seed(11)
        one.add_task("next")
        train(one, "next")
    for task in [*tasks, "next"]:
        assert torch.equal(images_of(loaded, task), images_of(model, task)), task
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_clip(), tmp_path / "again")
    assert torch.equal(images_of(again, "next"), images_of(model, "next"))


@pytest.mark.parametrize("state", ["grown", "redirected", "bounded", "fixed", "frozen"])
def test_a_baked_task_gives_the_same(state, tmp_path):
    model = saved_states()[state]
    for task in config_of(model).tasks:
        baked = model.bake_task(task)
        torch.testing.assert_close(images_of(baked, task), images_of(model, task), rtol=0, atol=1e-5)
        assert all(
            len(bank) <= len(model.expert_banks()[block]) and len(bank) <= 3
            for block, bank in baked.expert_banks().items()
        )
    baked.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_clip(), tmp_path)
    torch.testing.assert_close(images_of(loaded, task), images_of(model, task), rtol=0, atol=1e-5)


def test_a_task_bakes_where_some_routers_have_not_learnt():
    model = clip_pool(["a", "b"], experts_per_task=3, top_k=1)
    with torch.no_grad():
        for block in list(model.router_banks())[::2]:
            model.router_banks()[block].weight[1].zero_()
    baked = model.bake_task("b")
    torch.testing.assert_close(images_of(baked, "b"), images_of(model, "b"), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- precision and dropout


def test_dropout_acts_in_training_alone():
    model = net_pool(lora_dropout=0.5)
    x = inputs(4, 3)
    assert not torch.equal(model.train()(x), model(x))
    check_against_slow(model.eval(), x)


def test_dropout_keeps_the_mean():
    model = net_pool(lora_dropout=0.3, target_modules=["second"])
    x = inputs(4)
    plain = model.eval()(x)
    model.train()
    torch.manual_seed(0)
    rows = model(x.repeat(4000, 1)).reshape(4000, 4, OUT)
    spread = rows.std(dim=0) / math.sqrt(4000)
    assert ((rows.mean(dim=0) - plain).abs() < 5 * spread + 1e-12).all()


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_half_precision(per_task, top_k):
    torch.manual_seed(0)
    fields = {"tasks": ["a", "b"], "r": 2, "experts_per_task": per_task, "top_k": top_k}
    model = get_peft_model(tiny_clip().to(torch.bfloat16), MoELoraMergeConfig.pool(**fields)).train()
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    batch = tiny_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    model.add_task("c")
    for ids in (None, torch.tensor([0, 2, -1, 0])):
        output = model(**batch, task_ids=ids).logits_per_image
        output.float().sum().backward()
        assert output.isfinite().all()
    assert all(
        parameter.grad.isfinite().all() for parameter in trainable(model).values() if parameter.grad is not None
    )


@pytest.mark.parametrize("per_task, top_k", [(1, 1), (2, 2), (3, 2)])
def test_autocast(per_task, top_k):
    model = clip_pool(["a", "b"], experts_per_task=per_task, top_k=top_k)
    exact = model(**tiny_batch()).logits_per_image
    for ids in (None, torch.tensor([0, 1, -1, 0])):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**tiny_batch(), task_ids=ids).logits_per_image
        output.float().sum().backward()
        assert output.isfinite().all()
        if ids is None and per_task == top_k:  # where a choice is close, half precision may choose otherwise
            torch.testing.assert_close(output.float(), exact, rtol=0.1, atol=0.2)


# ---------------------------------------------------------------------------------------------------------- LoRA plus


def test_loraplus_groups():
    model = clip_pool(["a", "b"])
    model.set_task("b")
    slow, fast = loraplus_groups(model, lr=1e-3, ratio=4)
    assert (slow["lr"], fast["lr"]) == (1e-3, 4e-3)
    up = {id(p) for bank in model.expert_banks().values() for p in bank.up_weight if p.requires_grad}
    assert {id(parameter) for parameter in fast["params"]} == up
    every = [id(parameter) for group in (slow, fast) for parameter in group["params"]]
    assert sorted(every) == sorted(id(parameter) for parameter in trainable(model).values())
    before = all_tensors(model)
    train(model, "b", steps=1, optimizer=torch.optim.SGD([slow, fast]))
    assert not same_tensors(before, all_tensors(model))
    for ratio in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            loraplus_groups(model, lr=1e-3, ratio=ratio)
    model.set_task(None)
    with pytest.raises(ValueError, match="set_task"):
        loraplus_groups(model, lr=1e-3, ratio=4)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "fields, way_out",
    [
        ({"num_experts": 3, "tasks": ["a", "b"]}, "need 4, the pool has 3.*merge_at='pool_full'"),
        ({"max_experts": 3, "tasks": ["a", "b"]}, "need 4, the pool has 3.*add_task"),
        ({"experts_per_task": 3, "max_experts": 2}, "raise `max_experts` or lower `experts_per_task`"),
        ({"experts_per_task": 3, "num_experts": 2}, "raise `num_experts` or lower `experts_per_task`"),
        ({"num_experts": 4, "max_experts": 4}, "num_experts='grow'"),
        ({"task_experts": "shared", "merge_at": "steps"}, "task_experts='reserved', or merge_routing='keep'"),
        ({"expert_activation": "relu"}, "expert_activation='identity', or 'average' or 'aligned'"),
        ({"merge_routing": "keep"}, "merge_routing='redirect'"),
        ({"top_k": 3}, "lower `top_k` or raise `experts_per_task`"),
        ({"num_experts": "shrink"}, "positive integer, or 'grow', got 'shrink'"),
        ({"num_experts": True}, "positive integer"),
        ({"max_experts": 0}, "positive integer"),
        ({"experts_per_task": 0, "top_k": 0}, "positive integer"),
        ({"router_noise": -0.1}, "at least 0"),
        ({"router_noise": float("nan")}, "at least 0"),
        ({"expert_activation": "sine"}, "must be one of"),
        ({"merge_at": "never"}, "must be one of"),
        ({"task_experts": "own"}, "must be one of"),
    ],
)
def test_contradictions_are_refused(fields, way_out):
    with pytest.raises(ValueError, match=way_out):
        MoELoraMergeConfig.pool(**fields)


def test_the_advice_for_contradictions_is_followed():
    for fields in (
        {"num_experts": 4, "tasks": ["a", "b"]},
        {"experts_per_task": 3, "max_experts": 3},
        {"task_experts": "shared", "merge_routing": "keep", "merge_at": "steps"},
        {"expert_activation": "relu", "merge_strategy": "aligned"},
        {"top_k": 3, "experts_per_task": 3},
    ):
        config = MoELoraMergeConfig.pool(**fields)
        assert all(getattr(config, name) == value for name, value in fields.items())


def test_a_taken_name_changes_nothing():
    model = net_pool()
    before = all_tensors(model)
    with pytest.raises(ValueError, match=re.escape("'b' is named twice")):
        model.add_task("b")
    assert same_tensors(all_tensors(model), before)
