"""Which experts of the pool the tasks of benchmarks/shared_layers.py share."""

# ruff: noqa: F401, F811 -- fixtures are imported

import pytest
import torch
from shared_layers import SHARED, SharedPool
from small_methods import make, run, some_batch, tasks

from peft_moe_merge.mtil.methods import METHODS

HALVES = {"none": 0, "first half": 2, "all": 3}  # of the three blocks of a tower


@pytest.mark.parametrize("shared", list(SHARED))
def test_shared_layers_go_on_learning_and_others_stay(shared, make, tasks, monkeypatch):
    monkeypatch.setitem(METHODS, "shared", type("Shared", (SharedPool,), {"shared": shared}))
    method = make("shared")
    trained = []
    for task in tasks:
        before = {name: weight.clone() for name, weight in method.model.named_parameters()}
        method.begin_task(task)
        trained.append(sum(weight.numel() for weight in method.trainable_parameters()))
        optimizer = torch.optim.SGD(method.trainable_parameters(), lr=0.1)
        for _ in range(2):  # up projections first: down projections have a gradient once these are not zero
            method.loss(method.model, some_batch(classes=3)).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.end_task()
        changed = {
            name
            for name, weight in method.model.named_parameters()
            if name in before and not torch.equal(weight, before[name])
        }
        blocks = {int(name.partition(".layers.")[2].partition(".")[0]) for name in changed}
        assert blocks == (set() if task is tasks[0] else set(range(HALVES[shared])))
        assert all(".moe_lora_experts." in name for name in changed)
    assert len(set(trained)) == 1, "whatever is shared"


def test_sharing_none_is_the_pool(run, monkeypatch):
    monkeypatch.setitem(METHODS, "shared", SharedPool)
    one, other = run("shared", count=2), run("moe_lora_pool", count=2)
    assert (one.matrix, one.losses) == (other.matrix, other.losses)


def test_a_stop_changes_nothing_where_all_is_shared(run, monkeypatch):
    monkeypatch.setitem(METHODS, "shared", type("Shared", (SharedPool,), {"shared": "all"}))
    whole = run("shared", folder="whole", lr=1e-2)
    run("shared", folder="stopped", lr=1e-2, stop_after=2)
    resumed = run("shared", folder="stopped", lr=1e-2, resume=True)
    assert (resumed.matrix, resumed.losses) == (whole.matrix, whole.losses)
