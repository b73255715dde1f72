"""Test-time adaptation: the losses against closed forms, learning, resuming, and what it refuses."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wemoe_clip import TASKS, finetune, small_clip, stir_routers

from peft_moe_merge.model_merging.adaptation import Adaptation
from peft_moe_merge.model_merging.losses import entropy, mutual_information
from peft_moe_merge.tuners.wemoe import WEMoEConfig, adapt_routers, merge_finetuned, zero_shot_logits
from peft_moe_merge.tuners.wemoe.adapt import distance_from_prior


@pytest.fixture
def model():
    base = small_clip()
    finetuned = {task: finetune(base, seed, size=0.1) for seed, task in enumerate(TASKS, start=1)}
    torch.manual_seed(0)
    return merge_finetuned(base, finetuned, WEMoEConfig())


@pytest.fixture
def heads():
    g = torch.Generator().manual_seed(1)
    return {task: F.normalize(torch.randn(5, 16, generator=g), dim=-1) for task in TASKS}


def loaders(shuffle=True, tasks=TASKS):
    g = torch.Generator().manual_seed(2)
    sets = {task: TensorDataset(torch.randn(10, 3, 16, 16, generator=g)) for task in tasks}
    return {task: DataLoader(dataset, batch_size=4, shuffle=shuffle) for task, dataset in sets.items()}


def router_state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".wemoe_router." in n}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_losses_have_their_closed_forms():
    uniform, sure = torch.zeros(6, 4), 1e4 * torch.eye(4)
    collapsed = 1e4 * F.one_hot(torch.zeros(6, dtype=torch.long), 4).float()
    log4 = torch.tensor(4.0).log()
    gates = [torch.full((6, 3), 0.5)]
    torch.testing.assert_close(entropy(uniform), log4)
    torch.testing.assert_close(entropy(collapsed), torch.tensor(0.0))
    torch.testing.assert_close(mutual_information(sure), -log4)
    torch.testing.assert_close(mutual_information(collapsed), torch.tensor(0.0))  # collapse gains nothing
    torch.testing.assert_close(mutual_information(uniform), torch.tensor(0.0))
    torch.testing.assert_close(distance_from_prior(gates, 0.3), torch.tensor(0.04))


@pytest.mark.parametrize("loss", ["entropy", "mutual_information", "entropy_with_prior"])
def test_adaptation_lowers_its_loss_and_trains_routers_only(model, heads, loss):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    data = loaders(shuffle=False)
    history = adapt_routers(model, data, Adaptation(steps=30, loss=loss, lr=1e-3), heads=heads, progress=False)
    assert len(history) == 30
    # The same batches come round every three steps.
    first, last = (sum(row["loss"] for row in rows) for rows in (history[:3], history[-3:]))
    assert last < first - 0.01
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(".wemoe_router." in name for name in changed)
    assert history[0]["lr"] == 1e-3 and history[-1]["lr"] < 1e-5


def test_one_step_is_adam_on_the_sum_of_the_tasks_losses(model, heads):
    batches = {
        task: [torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(i))] for i, task in enumerate(TASKS)
    }
    by_hand = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam([p for p in by_hand.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for task, (images,) in batches.items():
            p = zero_shot_logits(by_hand, images, heads[task]).softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        total.backward()
        optimizer.step()
    history = adapt_routers(
        model, batches, Adaptation(steps=2, lr=1e-3, schedule="constant"), heads=heads, progress=False
    )
    assert history[-1]["loss"] == pytest.approx(total.item(), rel=1e-5)
    expected = router_state(by_hand)
    for name, parameter in router_state(model).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-6)


def test_heads_and_prompts_in_the_batch_give_the_same(model):
    base = model.base_model.model
    input_ids = torch.tensor([[0, 5, 6, 1], [0, 7, 8, 1], [0, 9, 10, 1]])
    with torch.no_grad():
        head = F.normalize(base.get_text_features(input_ids=input_ids).pooler_output, dim=-1)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    by_head, by_prompt = model, copy.deepcopy(model)
    a = adapt_routers(by_head, {"cars": [images]}, Adaptation(steps=3), heads={"cars": head}, progress=False)
    batch = {"pixel_values": images, "input_ids": input_ids, "labels": torch.zeros(4)}
    b = adapt_routers(by_prompt, {"cars": [batch]}, Adaptation(steps=3), progress=False)
    for one, other in zip(a, b, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_resuming_equals_not_stopping(model, heads, tmp_path):
    run = {"heads": heads, "progress": False}
    whole, stopped = copy.deepcopy(model), copy.deepcopy(model)
    torch.manual_seed(11)
    adapt_routers(whole, loaders(), Adaptation(steps=11, lr=1e-3, seed=5), **run)

    class Stop(Exception):
        pass

    def stopping(loader, after):
        """A loader that breaks down, as a process does that is killed."""

        class Breaking(DataLoader):
            served = 0

            def __iter__(self):
                for batch in super().__iter__():
                    if self.served == after:
                        raise Stop
                    self.served += 1
                    yield batch

        return Breaking(loader.dataset, batch_size=4, shuffle=True)

    torch.manual_seed(99)  # the state of the global generator does not matter
    file = tmp_path / "adaptation.safetensors"
    with pytest.raises(Stop):
        broken = {task: stopping(loader, 8) for task, loader in loaders().items()}
        adapt_routers(
            stopped, broken, Adaptation(steps=11, lr=1e-3, seed=5), checkpoint=file, checkpoint_every=3, **run
        )
    assert file.exists()
    resumed = copy.deepcopy(model)  # as a new process would have it
    history = adapt_routers(
        resumed, loaders(), Adaptation(steps=11, lr=1e-3, seed=5), checkpoint=file, checkpoint_every=3, **run
    )
    assert [row["step"] for row in history] == [6, 7, 8, 9, 10]
    assert_same_state(router_state(resumed), router_state(whole))
    assert (
        adapt_routers(resumed, loaders(), Adaptation(steps=11, lr=1e-3, seed=5), checkpoint=file, **run) == []
    )  # done already
    assert [p.name for p in tmp_path.iterdir()] == [file.name]

    with pytest.raises(ValueError, match="checkpoint of another run"):
        adapt_routers(resumed, loaders(), Adaptation(steps=12, lr=1e-3, seed=5), checkpoint=file, **run)

    content, before = file.read_bytes(), router_state(resumed)
    start = 8 + int.from_bytes(content[:8], "little")
    for damaged in (content[:20], content[:-4], content[:start] + b"\xff" * (len(content) - start)):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="adaptation.safetensors'.*[dD]elete it to start anew"):
            adapt_routers(resumed, loaders(), Adaptation(steps=11, lr=1e-3, seed=5), checkpoint=file, **run)
    assert_same_state(router_state(resumed), before)
    file.unlink()  # what the message says
    assert len(adapt_routers(resumed, loaders(), Adaptation(steps=11, lr=1e-3, seed=5), checkpoint=file, **run)) == 11


def test_the_same_seed_gives_the_same_routers_and_another_does_not(model, heads):
    states = []
    for seed in (0, 0, 1):
        own = copy.deepcopy(model)
        adapt_routers(own, loaders(), Adaptation(steps=4, seed=seed), heads=heads, progress=False)
        states.append(router_state(own))
    assert_same_state(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_no_graph_is_kept_between_tasks(model, heads):
    """While one task is computed nothing of another task's graph is alive."""
    import gc
    import weakref

    alive = []

    def batches():
        g = torch.Generator().manual_seed(0)
        while True:
            gc.collect()
            assert sum(ref() is not None for ref in alive) == 0
            yield torch.randn(2, 3, 16, 16, generator=g)

    class Endless:
        def __iter__(self):
            return batches()

    for module in model.modules():
        if type(module).__name__ == "WEMoEBlock":
            module.register_forward_hook(lambda m, a, out: alive.append(weakref.ref(out)))
    adapt_routers(model, {"cars": Endless(), "dtd": Endless()}, Adaptation(steps=2), heads=heads, progress=False)
    assert alive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unlabelled": {}}, "no data to adapt to"),
        ({"unlabelled": {"planes": [1]}}, r"no task \['planes'\]; its tasks are \['cars', 'dtd', 'svhn'\]"),
        ({"unlabelled": {"cars": []}}, r"no batches to adapt to for \['cars'\]"),
        ({"unlabelled": {"cars": iter([])}}, "'cars' are used up"),
        ({"heads": {}}, r"lacks the class text features of \['cars'"),
    ],
)
def test_bad_input_is_named_before_training(model, heads, change, message):
    before = router_state(model)
    arguments = {"unlabelled": loaders(), "heads": heads, "how": Adaptation(steps=2), "progress": False, **change}
    with pytest.raises(ValueError, match=message):
        adapt_routers(model, arguments.pop("unlabelled"), **arguments)
    assert_same_state(router_state(model), before)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss": "likelihood"}, r"no loss 'likelihood'; choose one of \['entropy'"),
        ({"schedule": "linear"}, "no schedule 'linear'"),
        ({"steps": -1}, "`steps` must not be negative, got -1"),
        ({"lr": 0.0}, "`lr` must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Adaptation(**wrong)


def test_settings_by_their_names_are_understood_with_a_warning(model, heads):
    earlier, now = copy.deepcopy(model), model
    with pytest.warns(FutureWarning, match=r"`Adaptation\(steps=3, lr=0.01, seed=4\)`"):
        adapt_routers(earlier, loaders(), 3, heads=heads, lr=0.01, seed=4, progress=False)
    adapt_routers(now, loaders(), Adaptation(steps=3, lr=0.01, seed=4), heads=heads, progress=False)  # as it advises
    assert_same_state(router_state(earlier), router_state(now))
    with pytest.raises(ValueError, match=r"\['speed'\] are no settings of an adaptation; there are \['steps', 'loss'"):
        adapt_routers(now, loaders(), heads=heads, speed=1)


def test_few_labels_are_another_way_to_adapt(model, heads):
    """One step is Adam on the sum of the tasks' cross-entropies; without labels the loss says what it needs."""
    generator = torch.Generator().manual_seed(3)
    batches = {
        task: [(torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 5, (4,), generator=generator))]
        for task in TASKS
    }
    by_hand = copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam([p for p in by_hand.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        total = 0.0
        for task, ((images, labels),) in batches.items():
            log_p = zero_shot_logits(by_hand, images, heads[task]).log_softmax(-1)
            total = total - log_p[torch.arange(4), labels].mean()
        total.backward()
        optimizer.step()
    how = Adaptation(steps=2, loss="cross_entropy", lr=1e-3, schedule="constant")
    as_mappings = {task: [{"pixel_values": x, "labels": y} for x, y in rows] for task, rows in batches.items()}
    for data in (batches, as_mappings):
        own = copy.deepcopy(model)
        history = adapt_routers(own, data, how, heads=heads, progress=False)
        assert history[-1]["loss"] == pytest.approx(total.item(), rel=1e-5)
        for name, parameter in router_state(own).items():
            torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="'cross_entropy' needs labels.* or take a loss without labels"):
        adapt_routers(model, {"cars": [batches["cars"][0][0]]}, how, heads=heads, progress=False)


def test_nothing_to_train_is_said(heads):
    base = small_clip()
    model = merge_finetuned(base, {"cars": finetune(base, 1)}, WEMoEConfig(gates="projection"))
    with pytest.raises(ValueError, match="no trainable router"):
        adapt_routers(model, loaders(tasks=("cars",)), heads=heads)


def test_a_loss_that_is_not_finite_stops_with_the_routers_as_they_were(model, heads):
    before = router_state(model)
    bad = torch.full((2, 3, 16, 16), float("nan"))
    with pytest.raises(FloatingPointError, match="step 0"):
        adapt_routers(model, {"cars": [bad]}, Adaptation(steps=2), heads=heads, progress=False)
    assert_same_state(router_state(model), before)


def test_a_shared_router_learns_from_all_blocks(heads):
    base = small_clip()
    model = merge_finetuned(base, {"cars": finetune(base, 1, size=0.1)}, WEMoEConfig(shared_router=True))
    stir_routers(model)
    history = adapt_routers(model, loaders(tasks=("cars",)), Adaptation(steps=6, lr=1e-2), heads=heads, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]
