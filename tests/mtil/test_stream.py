"""The stream: real images, a matrix at the end, the same result after an interruption."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_moe_merge.mtil import checkpoint
from peft_moe_merge.mtil.clip import load_clip, small_clip
from peft_moe_merge.mtil.data.digits import load_digit_tasks
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.report.closing import closing
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

EXAMPLE = Path(__file__).parents[2] / "examples" / "mtil.py"
METHOD = MethodSettings(num_experts=8, r=8, merge_every=10)


def build(tasks, name="moe_lora_merge"):
    return lambda: METHODS[name](*load_clip(mini_clip_path()), METHOD)


def run(folder, tasks, name="moe_lora_merge", steps=25, **kwargs):
    settings = StreamSettings(steps=steps, batch_size=16, lr=[5e-3])
    return run_stream(tasks, build(tasks, name), settings, folder, Accelerator(cpu=True), seed=5, **kwargs)


@pytest.fixture(scope="module")
def tasks():
    return load_digit_tasks()


def test_stream_over_real_digits(tasks, tmp_path):
    straight = run(tmp_path / "straight", tasks)
    zero_shot = run(tmp_path / "zero_shot", tasks, "zero_shot")
    assert [len(row) for row in straight.matrix] == [3, 3, 3]
    for losses in straight.losses:
        assert len(losses) == 25 and sum(losses[-8:]) < sum(losses[:8]), "the loss falls in each task"
    for of_task in straight.history:
        assert [step for step, _ in of_task["merges"]] == [10, 20]
    for block in straight.history[0]["frozen"]:
        first, second, third = (set(of_task["frozen"][block]) for of_task in straight.history)
        assert len(first) == 2 and first <= second <= third
    assert any(len(frozen) > 2 for frozen in straight.history[-1]["frozen"].values())
    for later in (1, 2):  # a task not learnt yet is plain CLIP's
        for earlier in range(later):
            assert straight.matrix[earlier][later] == zero_shot.matrix[earlier][later]

    # stopped after two tasks and gone on with in a new process's stead: the same to the last bit
    stopped = run(tmp_path / "resumed", tasks, stop_after=2)
    assert stopped.matrix == straight.matrix[:2]
    resumed = run(tmp_path / "resumed", tasks, resume=True)
    assert (resumed.matrix, resumed.losses, resumed.history) == (straight.matrix, straight.losses, straight.history)
    weights = [
        load_file(tmp_path / name / "after_3" / "adapter_model.safetensors") for name in ("straight", "resumed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == ["after_3"], "one checkpoint stays"

    # what is on disk is the model
    clip, _ = load_clip(mini_clip_path())
    model = PeftModel.from_pretrained(clip, tmp_path / "straight" / "after_3")
    assert model.peft_config["default"].tasks == [task.name for task in tasks]
    assert model.frozen_experts() == straight.history[-1]["frozen"]


def test_an_interrupted_task_is_done_anew(tasks, tmp_path, monkeypatch):
    straight = run(tmp_path / "straight", tasks[:2], steps=8)
    method = METHODS["moe_lora_merge"]
    after_step, calls = method.after_step, []

    def interrupt(self, optimizer):
        calls.append(1)
        if len(calls) == 12:  # in the middle of the second task
            raise KeyboardInterrupt
        after_step(self, optimizer)

    monkeypatch.setattr(method, "after_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tasks[:2], steps=8)
    monkeypatch.setattr(method, "after_step", after_step)
    resumed = run(tmp_path / "cut", tasks[:2], steps=8, resume=True)
    assert resumed.matrix == straight.matrix and resumed.losses == straight.losses


def test_a_failed_write_keeps_the_checkpoint_before(tasks, tmp_path):
    progress = run(tmp_path, tasks[:2], steps=4, stop_after=1)
    before = {path: path.read_bytes() for path in (tmp_path / "after_1").iterdir()}
    progress.matrix.append([0.0, 0.0])

    def disk_full(folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, progress, disk_full)
    assert checkpoint.newest(tmp_path) == tmp_path / "after_1"
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(run(tmp_path, tasks[:2], steps=4, resume=True).matrix) == 2


def test_a_run_is_not_overwritten_or_mixed_up(tasks, tmp_path):
    run(tmp_path, tasks[:2], "zero_shot")
    with pytest.raises(FileExistsError, match="holds a run already.*--resume"):
        run(tmp_path, tasks[:2], "zero_shot")
    with pytest.raises(ValueError, match="other settings: steps was 25, is 9"):
        run(tmp_path, tasks[:2], "zero_shot", steps=9, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"crop_scale": 1.5}, "`crop_scale` must lie in"),
        ({"lr": [1.0, 2.0]}, "2 learning rates for 3 tasks"),
    ],
)
def test_bad_settings(tasks, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run_stream(tasks, build(tasks), StreamSettings(**settings), tmp_path, Accelerator(cpu=True))


def test_tasks_need_names_of_their_own(tasks, tmp_path):
    with pytest.raises(ValueError, match="names of their own"):
        run(tmp_path, [tasks[0], tasks[0]])


def launch(*arguments, expect=0):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        str(EXAMPLE),
        "--cpu",
        *map(str, arguments),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == expect, done.stderr[-3000:]
    return done


def test_example(tmp_path):
    arguments = ("--steps", 12, "--batch_size", 16, "--num_experts", 6, "--r", 4, "--merge_every", 5)
    methods = ("--methods", "zero_shot", "moe_lora_merge")
    done = launch("--suite", "digits", *methods, *arguments, "--mixed_precision", "bf16", "--output_dir", tmp_path)
    for expected in ("moe_lora_merge, seed 42", "Transfer", "digits_7_to_9", "accuracy in %", "report.html"):
        assert expected in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["suite"] == "digits" and len(results["tasks"]) == 3
    assert done.stdout.rstrip().splitlines()[-2:] == closing(results, tmp_path / "report.html")
    (result,) = results["methods"]["moe_lora_merge"]
    assert {
        "seed",
        "matrix",
        "transfer",
        "average",
        "last",
        "forgetting",
        "seconds",
        "trainable_parameters",
        "stored_bytes",
    } <= result.keys()
    assert [step for step, _ in result["merges"][2]] == [5, 10]
    assert (tmp_path / "figures" / "accuracy_moe_lora_merge.png").stat().st_size > 5000
    assert (tmp_path / "report.html").read_text().count("data:image/png;base64,") >= 6


@pytest.mark.slow
def test_example_adds_to_its_folder(tmp_path):
    """More methods and seeds stand beside those of before, in tables and trackers; other settings are refused."""
    common = ("--suite", "digits", "--batch_size", 8, "--output_dir", tmp_path, "--log_with", "tensorboard")
    launch(*common, "--steps", 10, "--methods", "zero_shot", "--seeds", 1)
    first = json.loads((tmp_path / "results.json").read_text())["methods"]["zero_shot"]
    launch(*common, "--steps", 10, "--methods", "zero_shot", "lora", "--seeds", 0, "--resume")
    methods = json.loads((tmp_path / "results.json").read_text())["methods"]
    assert [run["seed"] for run in methods["zero_shot"]] == [0, 1] and methods["zero_shot"][1] == first[0]
    assert [run["seed"] for run in methods["lora"]] == [0]

    done = launch(*common, "--steps", 11, "--methods", "finetune", expect=1)
    assert "steps was 10, is 11" in done.stderr and not (tmp_path / "finetune").exists()

    events = EventAccumulator(str(tmp_path / "mtil")).Reload()
    losses = events.Scalars("lora/seed_0/loss")
    assert [scalar.step for scalar in losses] == [10, 20, 30]
    logged = [scalar.value for scalar in events.Scalars("lora/seed_0/accuracy/digits_0_to_3")]
    assert logged == pytest.approx([row[0] for row in methods["lora"][0]["matrix"]])


def test_example_refuses_before_the_first_step(tmp_path):
    folder = tmp_path / "images" / "task" / "train" / "only"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"no image")
    done = launch("--suite", tmp_path / "images", "--output_dir", tmp_path / "out", expect=1)
    assert "No images in" in done.stderr and "step" not in done.stdout


def test_untrained_clip_with_its_own_tokenizer(tasks, tmp_path):
    """The small CLIP is the same each time, tells prompts apart, and comes back from disk as it was."""
    prompts = [prompt for task in tasks for prompt in task.prompts(task.templates[0])]
    (clip, processor), (again, _) = small_clip(prompts), small_clip(prompts)
    assert all(torch.equal(a, b) for a, b in zip(clip.parameters(), again.parameters(), strict=True))
    tokens = processor.tokenizer(prompts, padding=True, return_tensors="pt")["input_ids"]
    assert (tokens[:, 0] == clip.config.text_config.bos_token_id).all()
    assert (tokens == clip.config.text_config.eos_token_id).any(dim=1).all() and len(tokens.unique(dim=0)) == 10
    clip.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = load_clip(tmp_path)
    inputs = loaded_processor(text=prompts[:3], images=[tasks[0].test[0]["image"].convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits_per_image, clip(**inputs).logits_per_image)


def test_photographs(real_images, real_clip, tmp_path):
    """A CLIP that was trained on other photographs learns three real domains; save, load, same features."""
    from peft_moe_merge.mtil.data.folders import load_folders

    tasks = load_folders(real_images, ["caltech101", "flowers102", "mnist"], progress=False)
    settings = StreamSettings(steps=30, batch_size=32, lr=[5e-3])
    method_settings = MethodSettings(num_experts=20, merge_every=12)

    def learn(name):
        accelerator = Accelerator(cpu=True)
        return run_stream(
            tasks,
            lambda: METHODS[name](*load_clip(real_clip), method_settings),
            settings,
            tmp_path / name,
            accelerator,
        )

    zero_shot, ours = learn("zero_shot"), learn("moe_lora_merge")
    for position in range(3):
        losses = ours.losses[position]
        assert sum(losses[-10:]) < sum(losses[:10])
        assert ours.matrix[position][position] > zero_shot.matrix[0][position] + 3
    model = PeftModel.from_pretrained(load_clip(real_clip)[0], tmp_path / "moe_lora_merge" / "after_3")
    assert model.frozen_experts() == ours.history[-1]["frozen"] and len(model.peft_config["default"].tasks) == 3
