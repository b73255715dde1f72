"""Bounds of a pool that can't be kept are refused before anything trains, and what the refusal advises works."""

import pytest
from experiments import play

from peft_moe_merge.mtil.methods.moe_lora_pool import PoolSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_experts": 1}, "experts_per_task=2 do not fit into a pool of at most 1: raise `max_experts` or lower"),
        ({"pool_strategy": "mean"}, "Unknown pool_strategy .*'mean'.*'product', 'keep_used'"),
        ({"pool_pair": "most_used"}, "Unknown pool_pair .*'most_used'.*'most_similar', 'random'"),
    ],
)
def test_values_are_checked_when_they_are_given(wrong, message):
    with pytest.raises(ValueError, match=message):
        PoolSettings(**wrong)


def test_a_pool_of_one_task_is_refused_for_two(experiment, tmp_path):
    with pytest.raises(
        ValueError, match="max_experts=2 leaves old tasks none .* raise `max_experts` to 3 at least, or"
    ):
        play(experiment(methods={"max_experts": 2}), tmp_path / "out", ["zero_shot", "moe_lora_pool"])
    assert not (tmp_path / "out").exists()
    for number, advised in enumerate(({"max_experts": 3}, {"max_experts": 2, "experts_per_task": 1})):
        results = play(experiment(methods=advised), tmp_path / str(number), ["moe_lora_pool"])
        assert results["methods"]["moe_lora_pool"][0]["experts"][-1] <= advised["max_experts"]
    alone = experiment(methods={"max_experts": 2}, data={"tasks": ["birds"]})
    alone.check(["moe_lora_pool"], [0], tmp_path / "alone")
