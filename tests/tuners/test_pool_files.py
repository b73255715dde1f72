"""A pool that has grown and merged is saved, loaded and baked."""

import pytest
import torch
from conftest import randomize, tiny_batch, tiny_clip
from peft import PeftModel
from pools import clip_pool, config_of, images_of, train, trainable


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


def test_two_pools_stand_side_by_side(tmp_path):
    states = saved_states()
    for name in ("bounded", "redirected"):
        states[name].save_pretrained(tmp_path / name)
    both = PeftModel.from_pretrained(tiny_clip(), tmp_path / "bounded", adapter_name="bounded")
    both.load_adapter(tmp_path / "redirected", adapter_name="redirected")
    for name in ("redirected", "bounded"):
        both.set_adapter(name)
        for task in config_of(states[name]).tasks:
            assert torch.equal(images_of(both, task), images_of(states[name], task))
