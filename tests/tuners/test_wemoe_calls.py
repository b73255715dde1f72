"""Nothing of one call is left on the modules: threads, replicas, checkpoints, contexts and tuners do not mix."""

import copy
import sys
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from wemoe_clip import TASKS, finetune, small_clip, stir_routers

from peft_moe_merge.tuners.wemoe import WEMoEConfig, merge_finetuned
from peft_moe_merge.tuners.wemoe.context import recorded_gates

FORMS = [
    {},
    {"rank": 4},
    {"sparsity": 0.9, "shared_router": True},
    {"gates": "projection", "gate_rank": 4, "top_k": 2},
]


def tuned():
    base = small_clip()
    return {task: finetune(base, seed, size=0.1) for seed, task in enumerate(TASKS, start=1)}


def merged(**options):
    torch.manual_seed(0)
    model = merge_finetuned(small_clip(), tuned(), WEMoEConfig(**options)).eval()
    stir_routers(model)
    return model


def images(seed, size=3):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def features(model, pixels):
    return model.get_image_features(pixel_values=pixels).pooler_output


def in_threads(jobs):
    """Run the jobs at once, switching between them as often as Python can."""
    results, errors = [None] * len(jobs), []

    def run(position):
        try:
            results[position] = jobs[position]()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(position,)) for position in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors, errors
    return results


@pytest.mark.parametrize("options", FORMS)
def test_threads_give_what_each_alone_gives(options):
    model = merged(**options)
    batches = [[images(100 * thread + i, size=1 + thread) for i in range(40)] for thread in range(3)]

    def job(own):
        def run():
            with torch.no_grad():
                return [features(model, pixels) for pixels in own]

        return run

    alone = [job(own)() for own in batches]
    together = in_threads([job(own) for own in batches])
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (alone[0][0] - alone[0][1]).abs().max() > 1e-3


def test_threads_record_their_own_gates_and_have_their_own_gradients():
    model = merged()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def job(seed):
        def run():
            found = []
            for i in range(15):
                with recorded_gates() as gates:
                    loss = features(model, images(seed + i, size=2 + seed % 2)).square().sum()
                found.append(([g.detach() for g in gates], torch.autograd.grad(loss, parameters)))
            return found

        return run

    jobs = [job(0), job(51)]
    for alone, together in zip([job() for job in jobs], in_threads(jobs), strict=True):
        for (gates, gradients), (other_gates, other_gradients) in zip(alone, together, strict=True):
            assert len(gates) == len(other_gates) == 2
            assert all(torch.equal(a, b) for a, b in zip(gates, other_gates, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(gradients, other_gradients, strict=True))


def replica_of(module):
    """A replica as `torch.nn.parallel.replicate` builds it for each device, with copies of the tensors."""
    modules = {m: m._replicate_for_data_parallel() for m in module.modules()}
    for original, replica in modules.items():
        replica._former_parameters = {}
        for name, child in original._modules.items():
            if child is not None:
                setattr(replica, name, modules[child])
        for name, tensor in (*original._parameters.items(), *original._buffers.items()):
            setattr(replica, name, None if tensor is None else tensor.clone())
    return modules[module]


@pytest.mark.parametrize("options", FORMS)
def test_replicas_of_data_parallel_work_on_their_own_tensors(options):
    model = merged(**options)
    replicas = [replica_of(model), replica_of(model)]
    with torch.no_grad():
        expected = [features(model, images(seed)) for seed in (1, 2)]
        for parameter in model.parameters():  # a replica that used these would show
            parameter.zero_()
        for buffer in model.buffers():
            buffer.zero_()

    def job(replica, seed):
        def run():
            with torch.no_grad():
                return [features(replica, images(seed)) for _ in range(10)]

        return run

    for actual, own in zip(
        in_threads([job(r, s) for r, s in zip(replicas, (1, 2), strict=True)]), expected, strict=True
    ):
        assert all(torch.equal(features, own) for features in actual)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_everything_recomputes_the_same(use_reentrant):
    model = merged()
    gradients = []
    for wrapped in (False, True):
        model.zero_grad()
        one, other = (images(seed).requires_grad_() for seed in (1, 2))
        if wrapped:  # both forward passes come before both recomputations
            run = lambda pixels: checkpoint(features, model, pixels, use_reentrant=use_reentrant)  # noqa: E731
            outputs = run(one), run(other)
        else:
            outputs = features(model, one), features(model, other)
        (outputs[0].square().sum() + outputs[1].sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad] + [one.grad, other.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_contexts_that_disable_the_adapter_nest():
    model, pixels = merged(), images(0)
    with_adapter, plain = features(model, pixels), features(small_clip(), pixels)
    with model.disable_adapter():
        assert torch.equal(features(model, pixels), plain)
        with model.disable_adapter():
            assert torch.equal(features(model, pixels), plain)
        assert torch.equal(features(model, pixels), plain)
    assert torch.equal(features(model, pixels), with_adapter)
    with pytest.raises(RuntimeError, match="in between"), model.disable_adapter():
        raise RuntimeError("in between")
    assert torch.equal(features(model, pixels), with_adapter)


@torch.no_grad()
def test_an_error_inside_a_call_leaves_nothing_behind():
    model, pixels = merged(), images(0)
    expected = features(model, pixels)
    layers = model.base_model.model.vision_model.encoder.layers
    handle = layers[1].mlp.base_layer.activation_fn.register_forward_hook(lambda *args: 1 / 0)
    with recorded_gates() as gates, pytest.raises(ZeroDivisionError):
        features(model, pixels)
    handle.remove()
    assert len(gates) == 2
    linear = layers[0].mlp.base_layer.fc1  # called by itself there are no gates, of an earlier call least of all
    x = torch.randn(2, 5, 32)
    assert torch.equal(linear(x), linear.base_layer(x))
    assert torch.equal(features(model, pixels), expected)


@torch.no_grad()
def test_a_second_tuner_on_one_base_is_refused_with_the_way_out(tmp_path):
    pixels = images(0)
    base = small_clip()
    first = merge_finetuned(base, tuned(), WEMoEConfig())
    stir_routers(first)
    expected = features(first, pixels)
    first.save_pretrained(tmp_path)
    for again in (
        lambda: merge_finetuned(base, tuned(), WEMoEConfig()),
        lambda: get_peft_model(base, WEMoEConfig(tasks=["a"])),
        lambda: PeftModel.from_pretrained(base, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"has adapters in it.*`peft_model.unload\(\)` gives it back"):
            again()
        assert torch.equal(features(first, pixels), expected)
    # what the message names
    first.load_adapter(tmp_path, "second")
    first.set_adapter("second")
    assert torch.equal(features(first, pixels), expected)
    plain = first.unload()
    assert torch.equal(features(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path), pixels), expected)
    assert torch.equal(features(PeftModel.from_pretrained(plain, tmp_path), pixels), expected)


def test_a_base_with_another_tuners_layers_is_refused(tmp_path):
    merged().save_pretrained(tmp_path)
    base = small_clip()
    get_peft_model(base, LoraConfig(target_modules=["fc1"]))
    kinds = [type(module) for module in base.modules()]
    for on_top in (
        lambda: merge_finetuned(base, tuned(), WEMoEConfig()),
        lambda: get_peft_model(base, WEMoEConfig(tasks=["a"])),
        lambda: PeftModel.from_pretrained(base, tmp_path),
    ):
        with pytest.raises(ValueError, match="has adapters in it"):
            on_top()
    assert [type(module) for module in base.modules()] == kinds


def test_all_adapters_of_a_model_can_be_exchanged():
    model = merged()
    model.delete_adapter("default")
    model.add_adapter("other", WEMoEConfig(tasks=["a", "b"]))
    model.set_adapter("other")
    assert torch.isfinite(features(model, images(0))).all()


@torch.no_grad()
def test_the_whole_tower_compiles_without_graph_breaks():
    model = merged(rank=4)
    compiled = torch.compile(lambda pixels: features(model, pixels), backend="eager", fullgraph=True)
    for seed in (0, 1):
        torch.testing.assert_close(compiled(images(seed)), features(model, images(seed)), rtol=1e-5, atol=1e-5)


def test_the_old_name_of_gates_is_accepted_with_a_warning():
    with pytest.warns(FutureWarning, match="`WEMoEConfig.router` is now `gates`"):
        old = WEMoEConfig(router="projection")
    assert old.gates == "projection" and "router" not in old.to_dict()
    with pytest.warns(FutureWarning):
        assert WEMoEConfig(router="mlp").gates == "learned"
    with pytest.warns(FutureWarning):
        assert old.router == "projection"
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="router='magic'"):
        WEMoEConfig(router="magic")
