"""Small models with an expert pool, and what they should compute, told slowly. Seeded."""

import math

import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from torch import nn

from peft_moe_merge import MoELoraMergeConfig

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
