"""Killed at any moment, a process lost, the disk full: a run goes on afterwards and ends as if nothing had happened."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from conftest import files_up_to
from processes import PATIENCE, start, world
from safetensors.torch import load_file

from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.results import empty_results, run_result, write_results
from peft_moe_merge.mtil.stream import Stream, StreamSettings, run_stream

EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"
WEIGHTS = "moe_lora_merge/seed_42/after_3/adapter_model.safetensors"


def learn(folder, steps=6, stop_after=None):
    """What the example does, without its report."""
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    stream = [replace(task, test=task.test.select(range(48))) for task in load_digit_tasks()]
    settings = StreamSettings(steps=steps, batch_size=16, lr=[5e-3])
    progress = run_stream(
        stream,
        lambda: METHODS["moe_lora_merge"](
            *load_clip(mini_clip_path()), MethodSettings(num_experts=24, r=32, merge_every=2)
        ),
        settings,
        folder / "moe_lora_merge" / "seed_42",
        accelerator,
        resume=True,
        stop_after=stop_after,
    )
    if len(progress.matrix) < len(stream) or not accelerator.is_main_process:
        return
    results = empty_results("digits", [task.name for task in stream], {})
    results["methods"]["moe_lora_merge"] = [run_result(42, progress)]
    write_results(folder / "results.json", results)


def results_of(folder):
    """All of `results.json` but the time it took."""
    results = json.loads((folder / "results.json").read_text())
    for runs in results["methods"].values():
        for run in runs:
            assert run.pop("seconds") > 0
    return results


def assert_same_outcome(actual, expected):
    assert results_of(actual) == results_of(expected)
    one, other = load_file(actual / WEIGHTS), load_file(expected / WEIGHTS)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert [path.name for path in (actual / WEIGHTS).parent.parent.iterdir()] == ["after_3"], "nothing else is left"


def partials(folder):
    return list(folder.glob("**/*.partial"))


def log_of(folder):
    return (folder / "log").read_text()


def wait(condition, seconds, alive):
    """Wait until the condition holds, the time is over, or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and alive() and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_killed_and_resumed(tmp_path):
    straight = start(learn, tmp_path / "straight")
    straight.join()
    assert straight.exitcode == 0

    folder, moments, left_half_written = tmp_path / "killed", random.Random(0), 0
    checkpoints = folder / "moe_lora_merge" / "seed_42"
    for condition, delay in (
        (lambda: partials(folder), 0.0),  # while a checkpoint is written
        ((checkpoints / "after_1").exists, 0.3),
        ((checkpoints / "after_2.partial").exists, 0.0),
        ((checkpoints / "after_2").exists, 0.3),
    ):
        process = start(learn, folder)
        wait(condition, 120, process.is_alive)
        process.join(moments.uniform(0, delay))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        left_half_written += len(partials(folder))
    last = start(learn, folder)
    last.join()
    assert last.exitcode == 0 and left_half_written
    assert_same_outcome(folder, tmp_path / "straight")


CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}
"""What Python tells of before it changes something on the disk."""


def killed_before_change(number, function):
    """Call a function in a process that is killed just before so many changes to the disk; tell whether it was."""
    child = os.fork()
    if child == 0:
        left = iter(range(number))

        def watch(event, arguments):
            writes = event != "open" or "w" in str(arguments[1])
            if event in CHANGES and writes and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_before_each_change_to_the_disk(tmp_path):
    """Whatever of a checkpoint has been written by then, or of the one before removed."""

    def write(folder):
        (folder / "selectors").mkdir()
        for name in ("weights.safetensors", "selectors/a.json"):
            (folder / name).write_text(f"{name} of {folder.name}")

    def save(folder, tasks):
        checkpoint.save(folder, Progress(settings={"processes": 1}, matrix=[[1.0]] * tasks), write)

    newest, kills = set(), 0
    while True:
        folder = tmp_path / str(kills)
        save(folder, 1)
        if not killed_before_change(kills, partial(save, folder, 2)):
            break
        kills += 1
        progress, found = checkpoint.load(folder, {"processes": 1})
        newest.add(len(progress.matrix))
        assert (found / "weights.safetensors").read_text().endswith(f"after_{len(progress.matrix)}.partial")
        checkpoint.drop_older(folder)
        assert list(folder.iterdir()) == [found], "nothing takes up room"
        save(folder, 3)
        assert [path.name for path in folder.iterdir()] == ["after_3"]
    assert newest == {1, 2} and kills >= 12


@contextmanager
def small_disk(folder, size):
    """A file system with room for so many bytes, or a skip where none can be made."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_does_not_fit(tmp_path):
    learn(tmp_path / "straight", steps=2)
    folder = tmp_path / "full"
    learn(folder, steps=2, stop_after=1)
    checkpoints = folder / "moe_lora_merge" / "seed_42"
    before = {path: path.read_bytes() for path in (checkpoints / "after_1").iterdir()}
    with files_up_to(1_000_000), pytest.raises(OSError, match=r"Could not write '.*/after_2'.*Make room.*--resume"):
        learn(folder, steps=2)
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in checkpoints.iterdir()] == ["after_1"], "nothing takes up room"
    learn(folder, steps=2)
    assert_same_outcome(folder, tmp_path / "straight")


def test_results_that_do_not_fit(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, {"runs": 1})
    with files_up_to(1000), pytest.raises(OSError, match="Could not write '.*results.json'.*as it was"):
        write_results(path, {"runs": [0] * 1000})
    assert json.loads(path.read_text()) == {"runs": 1} and [other.name for other in tmp_path.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------- killed at thirty moments, slowly

PHASES = ("training", "evaluation", "checkpoint")


def learn_noted(folder, environment):
    """Learn, and write down what is done: when, in which task, what."""
    os.environ.update(environment)
    with open(folder / "log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    phases = open(folder / f"phases_{os.environ.get('RANK', 0)}", "w", buffering=1)  # noqa: SIM115  (a kill closes it)
    here = [0]  # the task that was trained last

    def noted(phase, function):
        def call(*args, **kwargs):
            if phase == "training":
                here[0] = args[2]
            phases.write(f"{time.monotonic()} {here[0]} {phase}\n")
            return function(*args, **kwargs)

        return call

    Stream.train = noted("training", Stream.train)
    Stream.accuracy = noted("evaluation", Stream.accuracy)
    checkpoint.save = noted("checkpoint", checkpoint.save)
    torch.set_num_threads(1)
    learn(folder / "run")


def phases_of(folder, rank):
    """What a process has written down so far: when, in which task, what."""
    path = folder / f"phases_{rank}"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(when), int(task), phase) for when, task, phase in map(str.split, lines)]


def has_begun(folder, rank, task, phase):
    return (task, phase) in [told[1:] for told in phases_of(folder, rank)]


def all_alive(processes):
    return all(process.is_alive() for process in processes)


def learn_together(folder, size):
    folder.mkdir(exist_ok=True)
    for rank in range(size):
        (folder / f"phases_{rank}").unlink(missing_ok=True)
    environments = world(size) if size > 1 else [{}]
    return [start(learn_noted, folder, environment) for environment in environments]


def exit_codes(processes):
    for process in processes:
        process.join(PATIENCE)
    return [process.exitcode for process in processes]


def durations(folder):
    """How long each phase took at most, in a run that came to its end."""
    began = phases_of(folder, 0)
    took = {phase: [] for phase in PHASES}
    for (when, _, phase), (until, _, _) in itertools.pairwise(began):
        took[phase].append(until - when)
    return {phase: max(seconds) for phase, seconds in took.items()}


def done(folder):
    """How many tasks have their checkpoint."""
    return max((int(path.name[6:]) for path in folder.glob("run/*/seed_*/after_[0-9]")), default=0)


@pytest.mark.slow
def test_killed_at_thirty_moments(tmp_path):
    """A process, the only one or one of two, is killed in a phase and a task drawn at random, at a moment of it drawn at random.

    The other one, if there is one, ends by itself. Then the run goes on, and comes to what an undisturbed one does.
    """
    moments, hit, half_written, lasts = random.Random(0), [], 0, {}
    for size in (1, 2):
        straight = tmp_path / f"straight_{size}"
        assert exit_codes(learn_together(straight, size)) == [0] * size, log_of(straight)
        lasts[size] = durations(straight)
    for run, size in enumerate([1, 2, 2]):
        folder, kills = tmp_path / f"run_{run}", 0
        while kills < 10:
            victim, phase = moments.randrange(size), moments.choice(PHASES)
            task = done(folder) + (moments.random() < 0.3 and done(folder) < 2)
            watched = 0 if phase == "checkpoint" else victim  # the first process writes for all
            processes = learn_together(folder, size)
            wait(partial(has_begun, folder, watched, task, phase), PATIENCE, partial(all_alive, processes))
            processes[victim].join(moments.uniform(0.0, lasts[size][phase]))
            processes[victim].kill()
            codes = exit_codes(processes)
            assert codes[victim] in (0, -signal.SIGKILL), log_of(folder)
            assert all(code in (0, 1) for rank, code in enumerate(codes) if rank != victim), log_of(folder)
            if codes[victim] == -signal.SIGKILL:
                kills += 1
                half_written += bool(partials(folder))
                hit.append((size, victim, *phases_of(folder, victim)[-1][1:]))
            if done(folder) == 3:  # nothing is left to be killed in
                assert exit_codes(learn_together(folder, size)) == [0] * size, log_of(folder)
                assert_same_outcome(folder / "run", tmp_path / f"straight_{size}" / "run")
                shutil.rmtree(folder / "run")
        assert exit_codes(learn_together(folder, size)) == [0] * size, log_of(folder)
        assert_same_outcome(folder / "run", tmp_path / f"straight_{size}" / "run")
    print(
        f"{len(hit)} kills, {half_written} of them while a file was written; (processes, victim, task, phase):", *hit
    )
    assert len(hit) == 30 and half_written
    assert {phase for *_, phase in hit} == {*PHASES}
    assert {(size, victim) for size, victim, *_ in hit} == {(1, 0), (2, 0), (2, 1)}


@pytest.mark.slow
def test_a_disk_that_is_full_at_random_moments(tmp_path):
    """There is room for some of what is to be written, each time for another part; when there is enough nothing tells of it."""
    learn(tmp_path / "straight", steps=2)
    stored = (tmp_path / "straight" / WEIGHTS).stat().st_size
    moments, failed = random.Random(0), []
    with small_disk(tmp_path / "disk", 8 * stored) as disk:
        folder, ballast = disk / "run", disk / "ballast"
        checkpoints = folder / "moe_lora_merge" / "seed_42"
        while len(failed) < 12:
            folder.mkdir(exist_ok=True)
            learnt = done(disk)
            rooms = (moments.random() * stored, stored + moments.uniform(-4e4, 4e4), 2 * stored)
            room = int(moments.choice(rooms) if learnt < 3 else moments.choice((0, 4096, 2 * stored)))
            before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))
            try:
                learn(folder, steps=2, stop_after=learnt + 1)  # one more task
            except OSError as error:
                assert "Could not write" in str(error) and "No space left" in str(error)
                failed.append((Path(str(error).split("'")[1]).name, room))
                assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
            ballast.unlink()
            if (folder / "results.json").exists():
                assert_same_outcome(folder, tmp_path / "straight")
                shutil.rmtree(folder)
        assert not partials(folder) and len(list(checkpoints.glob("*"))) <= 1
        learn(folder, steps=2)
        assert_same_outcome(folder, tmp_path / "straight")
    print("could not write, with so many bytes of room:", *failed)
    assert {"after_1", "after_2", "after_3"} <= {name for name, _ in failed}


# ------------------------------------------------------------------------------------- the example itself, slowly

ARGUMENTS = {
    "suite": "digits",
    "model": "untrained",
    "methods": "moe_lora_merge",
    "steps": 6,
    "batch_size": 16,
    "lr": 5e-3,
    "num_experts": 24,
    "r": 32,
    "merge_every": 2,
    "output_dir": "run",
    "resume": True,
    "cpu": True,
}


def arguments():
    return [f"--{name}={value}" for name, value in ARGUMENTS.items()]


def example(folder, *launcher, **environment):
    """Start the example in a folder, its own words in `log`."""
    folder.mkdir(exist_ok=True)
    with open(folder / "log", "a") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, str(EXAMPLE), *arguments()],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=log,
            stderr=log,
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert example(folder).wait(PATIENCE) == 0, log_of(folder)
    return folder


@pytest.mark.slow
def test_the_example_on_a_disk_that_is_full(undisturbed, tmp_path):
    stored = (undisturbed / "run" / WEIGHTS).stat().st_size
    with small_disk(tmp_path / "disk", int(1.6 * stored)) as folder:  # for one checkpoint, not for a second beside it
        assert example(folder).wait(PATIENCE) == 1
        assert "Could not write 'run/moe_lora_merge/seed_42/after_2'" in log_of(folder), log_of(folder)
        assert "Make room" in log_of(folder)
        assert [path.name for path in (folder / "run" / WEIGHTS).parents[1].glob("*")] == ["after_1"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        assert example(folder).wait(PATIENCE) == 0, log_of(folder)
        assert_same_outcome(folder / "run", undisturbed / "run")


def two_processes(folder):
    """Start both by hand, as on two nodes: nothing but themselves can end them."""
    return [example(folder, **environment) for environment in world(2)]


@pytest.fixture(scope="module")
def undisturbed_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed_pair")
    assert [process.wait(PATIENCE) for process in two_processes(folder)] == [0, 0], log_of(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_one_of_two_processes_is_lost(undisturbed_pair, tmp_path, lost):
    processes = two_processes(tmp_path)
    checkpoint = tmp_path / "run/moe_lora_merge/seed_42/after_1"
    wait(checkpoint.exists, PATIENCE, lambda: all(process.poll() is None for process in processes))
    time.sleep(0.2)
    processes[lost].kill()
    began = time.monotonic()
    assert processes[1 - lost].wait(120) == 1, log_of(tmp_path)
    print(f"process {1 - lost} ended {time.monotonic() - began:.1f} s after process {lost}")
    assert f"Process {1 - lost} of 2 had to stop in task 'digits_4_to_6'" in log_of(tmp_path), log_of(tmp_path)
    assert "--resume" in log_of(tmp_path)
    assert [process.wait(PATIENCE) for process in two_processes(tmp_path)] == [0, 0], log_of(tmp_path)
    assert_same_outcome(tmp_path / "run", undisturbed_pair / "run")


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_lost(undisturbed_pair, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
    launcher = example(tmp_path, *torchrun)
    checkpoint = tmp_path / "run/moe_lora_merge/seed_42/after_1"
    wait(checkpoint.exists, PATIENCE, lambda: launcher.poll() is None)
    next(child for child in psutil.Process(launcher.pid).children() if str(EXAMPLE) in child.cmdline()).kill()
    assert launcher.wait(120) == 1, log_of(tmp_path)
    assert "Signal 9 (SIGKILL)" in log_of(tmp_path)
    assert example(tmp_path, *torchrun).wait(PATIENCE) == 0, log_of(tmp_path)
    assert_same_outcome(tmp_path / "run", undisturbed_pair / "run")
