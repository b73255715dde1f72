"""Benchmarks/unseen_tasks.py: the union of the tasks so far, on tasks that come later."""

from dataclasses import replace

import pytest
from accelerate import Accelerator
from unseen_tasks import measure

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.stream import Stream, StreamSettings, run_stream


def test_after_one_task_the_union_is_that_task(tmp_path, monkeypatch):
    (digits, *_) = load_digit_tasks()
    few = replace(digits, train=digits.train.select(range(64)), test=digits.test.select(range(50)))
    tasks = [replace(few, name="first"), replace(few, name="second", test=digits.test.select(range(50, 150)))]

    def build():
        return METHODS["moe_lora_warm"](
            *load_clip(mini_clip_path()), MethodSettings(experts_per_task=1, pool_r=16, warm_lr=1e-2)
        )

    steps = StreamSettings(steps=12, batch_size=16, lr=[1e-2])
    progress = run_stream(tasks, build, steps, tmp_path, Accelerator(cpu=True))
    monkeypatch.setattr("unseen_tasks.load_suite", lambda suite: tasks)
    found = measure(tmp_path, "digits", str(mini_clip_path()))

    method = build()
    method.load(tmp_path / "after_2")
    method.prepare_evaluation = lambda task: method.set_task("first")
    by_first = Stream(tasks, steps, Accelerator(cpu=True)).accuracy(method, tasks[1])
    assert found["Transfer, plain CLIP"] == progress.matrix[0][1] != by_first
    assert found["Transfer, merged"] == by_first
    assert found["Average, merged"] - found["Average, plain CLIP"] == pytest.approx(
        (by_first - progress.matrix[0][1]) / 4
    )


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(
        SystemExit, match="holds no run: give folders such as runs/table/seed_100/moe_lora_warm/seed_100"
    ):
        measure(tmp_path, "mini", "none")
