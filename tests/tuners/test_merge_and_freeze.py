"""What merging and freezing do to weights, counts and the optimizer."""

import copy

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import get_peft_model
from torch import nn

from peft_moe_merge import MoELoraMergeConfig

BLOCK = "vision_model.encoder.layers.0.mlp"
TENSORS = ("down_weight", "down_bias", "up_weight", "up_bias")


def adapted(num_experts=8, tasks=("a", "b", "c", "d"), seed=0, **kwargs):
    torch.manual_seed(seed)
    config = MoELoraMergeConfig(num_experts=num_experts, r=4, tasks=list(tasks), **kwargs)
    return get_peft_model(tiny_clip(), config).train()


def optimizer_for(model, **kwargs):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, **{"lr": 1e-2, "weight_decay": 0.1, **kwargs})


def train_step(model, optimizer, step):
    batch = tiny_batch(images=4, seed=step)
    logits = model(**batch).logits_per_image
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    optimizer.zero_grad()


def expert(model, block, index):
    return {name: tensor.clone() for name, tensor in model.expert_parameters(block, index).items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in TENSORS)


def set_usage(model, counts):
    """Counts as if training had produced them, in every block."""
    for routers in model.router_banks().values():
        routers.usage[model.peft_config["default"].current_index] = torch.tensor(counts)


def test_counts_are_those_of_the_routers_choices():
    model = adapted()
    randomize(model)
    chosen = {}

    def remember(name):
        return lambda module, args, output: chosen.setdefault(name, []).append(output[0])

    hooks = [routers.register_forward_hook(remember(name)) for name, routers in model.router_banks().items()]
    for step in range(3):
        model(**tiny_batch(seed=step))
    for hook in hooks:
        hook.remove()
    usage = model.expert_usage()
    for name, decisions in chosen.items():
        # one decision serves all three prompts, each of which adds 1 to each of its experts
        weight = 3 if name.startswith("text_model") else 1
        expected = weight * torch.bincount(torch.cat(decisions).flatten(), minlength=8)
        assert torch.equal(usage[name], expected)
        assert usage[name].sum() == 3 * 2 * (3 if name.startswith("text_model") else 4)
        assert usage[name].dtype == torch.int64


def test_only_training_counts_and_every_task_has_counts_of_its_own():
    model = adapted()
    model.eval()
    model(**tiny_batch())
    assert not any(counts.any() for counts in model.expert_usage().values())
    model.train()
    model.set_task("a")
    model(**tiny_batch())
    of_a = model.expert_usage()
    model.set_task("b")  # as an evaluation in between might
    assert not any(counts.any() for counts in model.expert_usage().values())
    model.set_task("a")
    assert all(torch.equal(counts, of_a[block]) for block, counts in model.expert_usage().items())
    model(**tiny_batch(), task_ids=torch.tensor([0, 0, 1, -1]))
    assert model.expert_usage()[BLOCK].sum() == of_a[BLOCK].sum() + 2 * 2
    model.reset_expert_usage()
    assert not any(counts.any() for counts in model.expert_usage().values())
    model.set_task("b")
    assert model.expert_usage()[BLOCK].sum() == 2


@pytest.mark.parametrize("strategy", ["average", "aligned"])
def test_merge_overwrites_the_least_used_and_nothing_else(strategy):
    model = adapted(merge_strategy=strategy)
    randomize(model)
    set_usage(model, [7, 2, 9, 0, 5, 4, 3, 1])
    bank = model.expert_banks()[BLOCK]
    with torch.no_grad():  # experts 0 and 2 are one function, with its hidden units in another order
        for name in TENSORS:
            source = getattr(bank, name)[2]
            getattr(bank, name)[0].copy_(source if name == "up_bias" else source[[2, 0, 3, 1]])
    before = [expert(model, BLOCK, index) for index in range(8)]
    routers = copy.deepcopy(model.router_parameters(BLOCK, "a"))
    merges = model.merge_experts()
    assert set(merges) == set(model.expert_usage()) and all(merge == (3, 2, 0) for merge in merges.values())
    after = [expert(model, BLOCK, index) for index in range(8)]
    assert all(equal(before[index], after[index]) for index in range(8) if index != 3)
    first, second = before[2], before[0]
    for name in TENSORS:
        union = first[name] if strategy == "aligned" else (first[name] + second[name]) / 2
        torch.testing.assert_close(after[3][name], union)
    assert all(torch.equal(routers[name], tensor) for name, tensor in model.router_parameters(BLOCK, "a").items())


def test_router_columns_may_follow():
    model = adapted(merge_routing="mean")
    randomize(model)
    set_usage(model, [7, 2, 9, 0, 5, 4, 3, 1])
    before = copy.deepcopy([model.router_parameters(BLOCK, task) for task in "ab"])
    model.merge_experts()
    now = model.router_parameters(BLOCK, "a")
    for name, weight in before[0].items():
        torch.testing.assert_close(now[name][:, 3], (weight[:, 0] + weight[:, 2]) / 2)
        others = [0, 1, 2, 4, 5, 6, 7]
        assert torch.equal(now[name][:, others], weight[:, others])
    assert torch.equal(model.router_parameters(BLOCK, "b")["weight"], before[1]["weight"]), "only the current task's"


def test_merge_resets_what_the_optimizer_knows_of_the_overwritten_expert():
    model = adapted(num_experts=3, top_k=2)
    optimizer = optimizer_for(model)
    for step in range(6):
        train_step(model, optimizer, step)
    bank = model.expert_banks()[BLOCK]
    known = {index: bank.down_weight[index] in optimizer.state for index in range(3)}
    assert all(known.values()), "with two of three experts per sample all of them have trained"
    set_usage(model, [5, 4, 1])
    model.merge_experts(optimizer)
    for name in TENSORS:
        assert not optimizer.state.get(getattr(bank, name)[2])
        assert optimizer.state[getattr(bank, name)[0]]["step"] >= 1
    train_step(model, optimizer, 7)
    model.set_task("a")
    for _ in range(4):
        train_step(model, optimizer, 8)
    assert 1 <= optimizer.state[bank.down_weight[2]]["step"] <= 5, "the overwritten expert began anew"


def test_unselected_experts_stay_to_the_last_bit():
    """Over steps with momentum and weight decay: whatever moved was selected in that very step.

    And the optimizer keeps state for those alone that have ever been selected.
    """
    model = adapted()
    optimizer = optimizer_for(model)
    moved_once, selected_once = set(), set()
    for step in range(12):
        before = {b: [expert(model, b, e) for e in range(8)] for b in model.expert_usage()}
        model.reset_expert_usage()
        train_step(model, optimizer, step)
        for block, counts in model.expert_usage().items():
            for index in range(8):
                moved = not equal(before[block][index], expert(model, block, index))
                assert moved <= bool(counts[index]), f"{block} expert {index} moved in step {step} unselected"
                moved_once |= {(block, index)} if moved else set()
                selected_once |= {(block, index)} if counts[index] else set()
        with_state = {
            (block, index)
            for block, bank in model.expert_banks().items()
            for index in range(8)
            if bank.down_weight[index] in optimizer.state
        }
        assert with_state == selected_once
        assert step > 0 or len(with_state) < 4 * 8
    assert len(moved_once) > 8


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_frozen_experts_stay_to_the_last_bit_over_three_later_tasks(optimizer_class):
    """One optimizer for all tasks, with momentum and weight decay from before the freeze."""
    model = adapted()
    extra = {torch.optim.SGD: {"momentum": 0.9}, torch.optim.RMSprop: {"momentum": 0.9}}.get(optimizer_class, {})
    optimizer = optimizer_class(model.parameters(), lr=1e-2, weight_decay=0.1, **extra)
    frozen_weights, frozen_before = {}, {block: [] for block in model.expert_usage()}
    for number, task in enumerate("abcd"):
        model.set_task(task)
        for step in range(8):
            train_step(model, optimizer, 100 * number + step)
            if step == 5:
                model.merge_experts(optimizer)
        for (block, index), weights in frozen_weights.items():
            assert equal(weights, expert(model, block, index)), f"{block} expert {index} changed during task {task}"
        usage = model.expert_usage()
        newly = model.freeze_experts(2)
        for block, frozen in model.frozen_experts().items():
            favourites = usage[block].argsort(descending=True, stable=True)[:2].tolist()
            assert frozen == sorted({*frozen_before[block], *favourites}), "cumulative: the favourites join"
            assert newly[block] == sorted(set(frozen) - set(frozen_before[block]))
            frozen_before[block] = frozen
            for index in frozen:
                frozen_weights.setdefault((block, index), expert(model, block, index))
    assert len(frozen_weights) >= 4 * 4
    routers_of_a = copy.deepcopy(model.router_parameters(BLOCK, "a"))
    model.set_task("d")
    train_step(model, optimizer, 999)
    assert all(torch.equal(routers_of_a[n], t) for n, t in model.router_parameters(BLOCK, "a").items())


def test_gradients_from_before_the_freeze_do_no_harm():
    model = adapted()
    optimizer = optimizer_for(model)
    model(**tiny_batch()).logits_per_image.sum().backward()
    model.freeze_experts(2)
    before = {b: {i: expert(model, b, i) for i in frozen} for b, frozen in model.frozen_experts().items()}
    optimizer.step()
    assert all(equal(w, expert(model, b, i)) for b, frozen in before.items() for i, w in frozen.items())


def test_training_goes_on_when_everything_is_frozen():
    model = adapted(num_experts=3)
    set_usage(model, [3, 2, 1])
    model.freeze_experts(3)
    assert all(frozen == [0, 1, 2] for frozen in model.frozen_experts().values())
    set_usage(model, [3, 2, 1])
    assert model.merge_experts() == {}
    optimizer = optimizer_for(model)
    train_step(model, optimizer, 0)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        model.freeze_experts(-1)


def test_gradient_accumulation_counts_every_micro_batch():
    model = adapted()
    for micro in range(3):
        model(**tiny_batch(seed=micro)).logits_per_image.sum().backward()
    assert all(counts.sum() == 3 * 2 * (3 if "text" in name else 4) for name, counts in model.expert_usage().items())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once_and_gives_the_same_gradients(reentrant):
    def run(checkpointing):
        model = adapted(lora_dropout=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        model(**tiny_batch()).logits_per_image.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and "moe_lora" in n}
        return gradients, model.expert_usage()

    (plain, counts), (checkpointed, counts_checkpointed) = run(False), run(True)
    assert all(torch.equal(counts[block], counts_checkpointed[block]) for block in counts)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)
