"""What a further task costs a pool does not depend on how many there are: counted, not timed."""

import gc
import json
import statistics
import sys

import pytest
import torch
from peft import PeftModel
from pools import Net, clip_pool, net_pool, train, trainable
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from peft_moe_merge import ExpertMergeCallback


class Calls:
    """Counts all calls of Python and C functions inside a `with` block."""

    def __enter__(self):
        self.count = 0
        sys.setprofile(self._see)
        return self

    def _see(self, frame, event, argument):
        self.count += event in ("call", "c_call")

    def __exit__(self, *error):
        sys.setprofile(None)


class Written(TorchDispatchMode):
    """Adds up the numbers that operations return."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers += result.numel()
        return result


def next_task(model, callback, name):
    """End the current task and begin another, as a stream does."""
    callback.end_task(model)
    model.add_task(name)
    model.set_task(name)
    callback.begin_task(model)


def pool_of(tasks, **fields):
    model = net_pool(["0"], **fields).train()
    callback = ExpertMergeCallback(None, 2)
    callback.begin_task(model)
    for task in range(1, tasks):
        model(torch.ones(2, 6, dtype=torch.float64))
        next_task(model, callback, str(task))
    model(torch.ones(2, 6, dtype=torch.float64))
    return model, callback


def test_adding_a_task_takes_the_same_calls_after_5_and_after_60():
    counts = []
    for tasks in (5, 60):
        model, callback = pool_of(tasks)
        with Calls() as calls:
            next_task(model, callback, "new")
        counts.append(calls.count)
    assert counts[0] == counts[1] > 0


def test_the_first_steps_of_a_task_take_the_same_calls_after_5_and_after_60():
    """In which is also looked whether the optimizer knows what trains."""
    counts = []
    for tasks in (2, 5, 60):  # the first time more happens, whatever there is
        model, callback = pool_of(tasks)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        with Calls() as calls:
            for _ in range(3):
                model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                callback.step(model, optimizer)
        counts.append(calls.count)
    assert counts[1] == counts[2] > 0


def test_what_a_task_adds_to_memory_and_to_each_step_is_linear():
    """Counts of selections were once kept for all tasks and all experts: that grew with the square."""
    stored, counted = [], []
    for tasks in (10, 20, 40):
        model, _ = pool_of(tasks)
        stored.append(sum(tensor.numel() for tensor in model.state_dict().values()))
        with Written() as written:
            model.share_expert_usage()
        counted.append(written.numbers)
    for first, second, third in (stored, counted):
        assert third - second == 2 * (second - first)


def test_a_task_that_has_trained_leaves_its_own_objects_behind_and_no_others():
    """In each of two layers five parameters, the experts' and the router's, its columns as a buffer and as a list."""
    model, callback = pool_of(3)
    counts = []
    for task in range(3, 26):
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-3)
        for _ in range(2):
            model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            callback.step(model, optimizer)
        next_task(model, callback, str(task))
        del optimizer
        gc.collect()
        counts.append(len(gc.get_objects()))
    # what others in the process make or drop once, in a cache, is in one of three spans of seven tasks
    grown = [counts[end] - counts[end - 7] for end in (-1, -8, -15)]
    assert statistics.median(grown) == 7 * 2 * (5 + 1 + 1)


def test_adding_a_task_touches_nothing_of_old_ones():
    model, callback = pool_of(4)
    model.share_expert_usage()
    before = {name: (tensor, tensor._version) for name, tensor in model.named_parameters()}
    next_task(model, callback, "new")
    after = dict(model.named_parameters())
    for name, (parameter, version) in before.items():
        assert after[name] is parameter and parameter._version == version, name


@pytest.mark.parametrize("bound", [None, 5])
def test_only_the_current_task_trains_whatever_was_set_before(bound):
    """As by looking at everything: also where tasks share experts that merged to make room."""
    model = clip_pool(["0"], max_experts=bound, experts_per_task=2)
    for task in ("1", "2", "3"):
        train(model, model.current_task, steps=2)
        model.freeze_experts(2)
        model.add_task(task)
        model.set_task(task)
    for task in ("3", "1", None, "0", "3"):
        model.set_task(task)
        expected = set()
        for block, bank in model.expert_banks().items() if task is not None else ():
            for expert in model.experts_of_task(task)[block]:
                expected |= set() if bank.frozen[expert] else {id(p) for p in bank.parameters_of(expert)}
            expected |= {id(p) for p in model.router_banks()[block].parameters_of(int(task))}
        assert {id(p) for p in trainable(model).values()} == expected


def test_experts_that_are_made_for_another_layers_sake_do_not_train():
    """One layer has room and the other has not, so the pool grows in both: what the first has too many waits."""
    model = net_pool(["a", "b"]).train()
    first = model.router_banks()["first"].columns
    first.redirect(first.lists[1][0], first.lists[0][0])
    first.redirect(first.lists[1][1], first.lists[0][1])
    model.add_task("c")
    model.set_task("c")
    for name, bank in model.expert_banks().items():
        own = model.router_banks()[name].experts_of(2)
        training = {expert for expert in range(len(bank)) if bank.parameters_of(expert)[0].requires_grad}
        assert training == set(own) and len(own) == 2
    assert len(first.free) == 2


def test_gradients_of_the_task_before_are_dropped():
    model, _ = pool_of(3)
    model(torch.ones(2, 6, dtype=torch.float64)).sum().backward()
    kept = [p for p in model.parameters() if p.grad is not None]
    assert kept
    model.set_task("0")
    assert all(p.grad is None for p in kept)


def test_counts_by_column_say_what_was_selected_and_follow_a_merge():
    model, _ = pool_of(3)
    for block, counts_E in model.expert_usage("1").items():
        assert counts_E.tolist() == [0, 0, 2, 2, 0, 0], block
    model.merge_experts(task="1")
    for block, counts_E in model.expert_usage("1").items():
        (kept,) = set(model.experts_of_task("1")[block])
        assert counts_E.tolist() == [4 if e == kept else 0 for e in range(6)], block


def test_files_that_count_by_expert_are_read(tmp_path):
    model, _ = pool_of(3)
    wanted = {task: model.expert_usage(task) for task in ("0", "1", "2")}
    model.save_pretrained(tmp_path)
    file, tensors = tmp_path / "adapter_model.safetensors", load_file(tmp_path / "adapter_model.safetensors")
    for key in [key for key in tensors if key.endswith(".usage")]:
        block = next(block for block in wanted["0"] if f".{block}." in key)
        tensors[key] = torch.stack([wanted[task][block] for task in wanted])
    save_file(tensors, file)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    del described["checksums"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    loaded = PeftModel.from_pretrained(Net().double(), tmp_path)
    for task, usage in wanted.items():
        for block, counts_E in loaded.expert_usage(task).items():
            assert torch.equal(counts_E, usage[block]) and counts_E.any()
