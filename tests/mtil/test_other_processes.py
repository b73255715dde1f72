"""A stream that goes on with more or fewer processes, or sharded, in real processes over gloo: it comes to the same.

To compare at all, images are not cropped, routers have no noise, nothing is dropped, and the numbers are of double precision.
"""

import warnings
from dataclasses import replace

import pytest
from differences import assert_alike
from processes import run_together
from test_sharded_stream import learn, outcome

from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.methods.moe_lora_merge import MixtureSettings
from peft_moe_merge.mtil.methods.moe_lora_pool import PoolSettings
from peft_moe_merge.mtil.results import empty_results, extended_results, run_result, write_results

METHODS = {
    "moe_lora_pool": {"pool_r": 2, "max_experts": 5, "experts_per_task": 2},
    "moe_lora_merge": {"num_experts": 8, "r": 2, "merge_every": 2},
    "lora_per_task": {"lora_r": 2},
    "finetune": {},
}


def without_chance(settings_class):
    """Let a method's experts have neither noise nor dropout."""
    configured = settings_class.config

    def config(self, tasks):
        return replace(configured(self, tasks), router_noise=0.0, lora_dropout=0.0)

    settings_class.config = config


def learn_without_chance(way, name, folder, stops):
    for settings_class in (MixtureSettings, PoolSettings):
        without_chance(settings_class)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learn(way, name, folder, METHODS[name], stops, crop_scale=1.0)
    assert any("each process for itself" in str(one.message) for one in said) == (stops == (None,))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_it_goes_on_with_other_processes(name, tmp_path):
    straight = tmp_path / "straight"
    run_together(1, learn_without_chance, "ddp", name, straight, (3,))
    expected_progress, expected = outcome(straight)
    for folder, (first, then, way) in {
        "one, then two": (1, 2, "ddp"),
        "two, then one": (2, 1, "ddp"),
        "one, then two sharded": (1, 2, "fsdp"),
    }.items():
        run_together(first, learn_without_chance, "ddp", name, tmp_path / folder, (1, 2))
        run_together(then, learn_without_chance, way, name, tmp_path / folder, (None,))
        progress, weights = outcome(tmp_path / folder)
        assert progress["processes"] == [first, first, then] and progress["matrix"] == expected_progress["matrix"]
        counted = {  # every process counts for all prompts
            key: counts * then for key, counts in expected.items() if key.endswith("usage") and "text_model" in key
        }
        assert bool(counted) == name.startswith("moe_lora")
        assert_alike(f"{name}, {folder} and one", weights, expected | counted)


def test_a_warning_says_what_another_number_of_processes_changes(tmp_path):
    settings = {"steps": 9, "processes": 1}
    told = Progress(settings=settings, matrix=[[50.0]], processes=[1])
    checkpoint.save(tmp_path, told, lambda folder: None)
    with pytest.warns(UserWarning, match="before had 1 process, what follows has 2.*random crops, and noise"):
        progress, _ = checkpoint.load(tmp_path, {**settings, "processes": 2})
    assert progress.settings["processes"] == 2 and progress.processes == [1]
    with pytest.raises(ValueError, match="other settings: steps was 9, is 8"):
        checkpoint.load(tmp_path, {"steps": 8, "processes": 2})

    path = tmp_path / "results.json"
    results = empty_results("suite", ["a"], {}, settings)
    results["methods"]["zero_shot"] = [run_result(1, told)]
    write_results(path, results)
    with pytest.warns(UserWarning, match="before had 1 process, what follows has 2"):
        extended = extended_results(path, empty_results("suite", ["a"], {}, {**settings, "processes": 2}))
    assert extended["methods"]["zero_shot"][0]["processes"] == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.load(tmp_path, settings)


def test_a_checkpoint_of_an_older_release_goes_on(tmp_path):
    settings = {"steps": 9, "processes": 2}
    checkpoint.save(tmp_path, Progress(settings=settings, matrix=[[50.0], [60.0]]), lambda folder: None)
    progress, _ = checkpoint.load(tmp_path, settings)
    assert progress.processes == [2, 2]
