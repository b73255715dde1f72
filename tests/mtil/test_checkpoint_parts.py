"""Checkpoints on the way write only what is new, and a run goes on from them to the same result."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

TASKS = 5


def tasks_of(count=TASKS):
    """The same few digits under as many names."""
    (task, *_) = load_digit_tasks()
    few = replace(task, train=task.train.select(range(16)), test=task.test.select(range(8)))
    return [replace(few, name=f"task {number}") for number in range(count)]


def learn(folder, tasks, stop_after=None, method="moe_lora_pool", selectors=(), **settings):
    return run_stream(
        tasks,
        lambda: METHODS[method](*load_clip(mini_clip_path()), MethodSettings(pool_r=2, **settings)),
        StreamSettings(steps=2, batch_size=8, lr=[1e-2]),
        folder,
        Accelerator(cpu=True),
        resume=True,
        stop_after=stop_after,
        selection=SelectorSettings(selectors=list(selectors), reject_rate=0.2),
    )


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without a stop, and of each checkpoint the bytes that were not there before."""
    folder, written = tmp_path_factory.mktemp("straight"), []
    tasks = tasks_of()
    for count in range(1, TASKS + 1):
        before = {path.stat().st_ino for path in files_of(folder).values()}
        learn(folder, tasks, stop_after=count)
        now = [path.stat() for path in files_of(folder).values()]
        written.append(sum(stat.st_size for stat in now if stat.st_ino not in before))
    return folder, written


def assert_same(one, other):
    assert files_of(one).keys() == files_of(other).keys()
    for name, path in files_of(one).items():
        twin = files_of(other)[name]
        if name.endswith(".safetensors"):
            tensors, twins = load_file(path), load_file(twin)
            assert tensors.keys() == twins.keys() and all(torch.equal(t, twins[n]) for n, t in tensors.items()), name
        elif name.endswith("progress.json"):
            told, again = json.loads(path.read_text()), json.loads(twin.read_text())
            assert told.pop("seconds") > 0 and again.pop("seconds") > 0 and told == again
        else:
            assert path.read_bytes() == twin.read_bytes(), name


def test_every_checkpoint_on_the_way_writes_as_much(straight):
    folder, written = straight
    on_the_way = written[: TASKS - 1]
    assert min(on_the_way) > 100_000
    assert max(on_the_way) - min(on_the_way) < 300 * TASKS, "but for the lines that name the files before"
    assert written[-1] > 3 * written[0], "the last one is whole, so that PEFT reads it"
    assert set(files_of(folder)) == {
        "after_5/adapter_model.safetensors",
        "after_5/adapter_config.json",
        "after_5/README.md",
        "after_5/progress.json",
        *(f"after_5/results_000{n}.json" for n in range(1, TASKS + 1)),
    }


def test_a_run_that_was_stopped_after_each_task_ends_as_one_that_was_not(straight, tmp_path):
    learn(tmp_path, tasks_of())
    assert_same(straight[0], tmp_path)


def test_a_whole_checkpoint_of_an_older_release_is_gone_on_with(straight, tmp_path):
    tasks = tasks_of()
    progress = learn(tmp_path, tasks, stop_after=3)
    method = METHODS["moe_lora_pool"](*load_clip(mini_clip_path()), MethodSettings(pool_r=2))
    method.load(tmp_path / "after_3")
    older = tmp_path / "older"
    older.mkdir()
    method.save(older)
    (older / "progress.json").write_text(json.dumps(vars(progress)))  # as it was: everything in one file
    shutil.rmtree(tmp_path / "after_3")
    older.rename(tmp_path / "after_3")
    learn(tmp_path, tasks, stop_after=4)
    names = set(files_of(tmp_path / "after_4"))
    assert {f"finished/task_000{n}.safetensors" for n in (1, 2, 3, 4)} <= names
    learn(tmp_path, tasks)
    assert_same(straight[0], tmp_path)


def test_a_part_that_is_missing_or_damaged(tmp_path):
    tasks = tasks_of(3)
    learn(tmp_path, tasks, stop_after=2)
    for file in ("finished/task_0002.safetensors", "results_0001.json"):
        path = tmp_path / "after_2" / file
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(ValueError, match=rf"after_2/{file}' is missing.*Put the file back from a copy"):
            learn(tmp_path, tasks)
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ValueError, match=rf"after_2/{file}' does not have the checksum.*Put the file back"):
            learn(tmp_path, tasks)
        path.write_bytes(content)  # as advised
    assert len(learn(tmp_path, tasks).matrix) == 3


def test_a_stop_between_writes_leaves_the_checkpoint_before_whole(tmp_path, monkeypatch):
    """When all is written but the folder has not its name yet; a killed process leaves the same."""
    learn(tmp_path, tasks_of(4), stop_after=2)
    before = {name: path.read_bytes() for name, path in files_of(tmp_path).items()}

    def stop(source, to, named=os.replace):
        if str(to).endswith("after_3"):
            raise KeyboardInterrupt
        named(source, to)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", stop)
        learn(tmp_path, tasks_of(4), stop_after=3)
    partial = tmp_path / "after_3.partial"
    assert (partial / "finished" / "task_0003.safetensors").exists() and (partial / "progress.json").exists()
    assert {n: p.read_bytes() for n, p in files_of(tmp_path).items() if ".partial" not in n} == before
    assert len(learn(tmp_path, tasks_of(4), stop_after=3).matrix) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["after_3"]


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    learn(tmp_path, tasks_of(3), stop_after=2)
    parts = sorted((tmp_path / "after_2" / checkpoint.FINISHED).iterdir())
    assert len(parts) == 2 and all(path.stat().st_nlink == 1 for path in parts)
    assert len(learn(tmp_path, tasks_of(3)).matrix) == 3


@pytest.mark.parametrize("method", ["lora_per_task", "inflora"])
def test_loras_are_written_once_too(tmp_path, method):
    tasks, written = tasks_of(3), []
    for count in range(1, 4):
        before = {path.stat().st_ino for path in files_of(tmp_path / "stops").values()}
        learn(tmp_path / "stops", tasks, count, method, lora_r=2)
        parts = [p for n, p in files_of(tmp_path / "stops").items() if f"/{checkpoint.FINISHED}/" in n]
        assert len(parts) == (0 if count == 3 else count), "the last one is whole, as it always was"
        written.append(sum(path.stat().st_ino not in before for path in parts))
    assert written == [1, 1, 0]
    learn(tmp_path / "straight", tasks, None, method, lora_r=2)
    assert_same(tmp_path / "straight", tmp_path / "stops")


def test_what_selectors_keep_of_a_task_is_written_once_too(tmp_path):
    tasks, written, kinds = tasks_of(4), [], ["discriminant", "gaussian"]
    for count in range(1, 5):
        before = {path.stat().st_ino for path in files_of(tmp_path / "stops").values()}
        progress = learn(tmp_path / "stops", tasks, count, selectors=kinds)
        now = {n: p for n, p in files_of(tmp_path / "stops").items() if "/selectors/" in n}
        new = [n for n, p in now.items() if p.stat().st_ino not in before]
        written.append(sum(now[n].stat().st_size for n in new if "/discriminant/" in n))
        parts = sorted(n.partition("/")[2] for n in new if "/task_" in n)
        assert parts == [f"selectors/{kind}/task_000{count}.safetensors" for kind in kinds if count < 4]
        assert "in_parts" not in progress.settings
        if count == 2:
            part = now[f"after_2/selectors/{kinds[0]}/task_0001.safetensors"]
            content = part.read_bytes()
            part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            with pytest.raises(
                ValueError, match="task_0001.safetensors' does not have the checksum.*Put the file back"
            ):
                learn(tmp_path / "stops", tasks, selectors=kinds)
            part.write_bytes(content)  # as advised
    assert max(written[:3]) - min(written[:3]) < 1000 and min(written[:3]) > 10_000
    assert not [n for n in now if "/task_" in n], "the last one is whole, for who takes a selector from it"
    straight = learn(tmp_path / "straight", tasks, selectors=kinds)
    assert straight.stored_bytes == progress.stored_bytes
    assert_same(tmp_path / "straight", tmp_path / "stops")


def test_a_bounded_pool_changes_old_tasks_and_is_written_whole(tmp_path):
    learn(tmp_path, tasks_of(4), stop_after=3, max_experts=4)
    assert (tmp_path / "after_3" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "after_3" / checkpoint.FINISHED).exists()
