"""The `Trainer` in two real processes over gloo: it comes to what it comes to in one, and resumes to the same.

To compare at all, dropout is off, every image gets the same routing noise in both cases, and the numbers are of double
precision; see `test_distributed`.
"""

import os
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny_batch, tiny_clip
from differences import assert_alike
from peft import get_peft_model
from processes import run_together
from safetensors.torch import load_file, save_file
from test_distributed import IMAGES, SameNoise
from transformers import CLIPForImageClassification, Trainer, TrainingArguments

from peft_moe_merge import ExpertMergeCallback, MoELoraMergeConfig, RouterFreezeCallback

PROMPTS = {name: tiny_batch()[name] for name in ("input_ids", "attention_mask")}
FIRST_STEPS, STEPS, SAVED_AT = 30, 20, 16


class ClassifyingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        output = model(**inputs, **PROMPTS)
        loss = torch.nn.functional.cross_entropy(output.logits_per_image, labels)
        return (loss, output) if return_outputs else loss


def images(count, seed):
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [{"pixel_values": pixels[i], "labels": i % 3} for i in range(count)]


def build(kind, noise):
    """A CLIP whose loss a subclass computes, or a classifier of images in the hands of a plain `Trainer`."""
    torch.manual_seed(0)
    model, trainer = tiny_clip(), ClassifyingTrainer
    if kind == "classifier":
        settings, trainer = model.config, Trainer
        settings.num_labels = 3
        model = CLIPForImageClassification(settings)
    config = MoELoraMergeConfig(num_experts=6, r=4, lora_dropout=0.0, tasks=["a", "b"])
    if noise == "none":
        config.router_noise = 0.0
    return get_peft_model(model.double(), config, autocast_adapter_dtype=False), trainer


def train(kind, noise, folder, resume=False):
    """Train on two tasks with merges, a stop of the routers and freezing, and write down what became of it."""
    adapted, trainer = build(kind, noise)
    told = {}
    for task, steps in (("a", FIRST_STEPS), ("b", STEPS)):
        adapted.set_task(task)
        merging, stopping = ExpertMergeCallback(merge_every=7), RouterFreezeCallback(at_step=25)
        arguments = TrainingArguments(
            output_dir=str(folder / task),
            max_steps=steps,
            per_device_train_batch_size=IMAGES // int(os.environ["WORLD_SIZE"]),
            per_device_eval_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            ddp_find_unused_parameters=True,
            save_strategy="no" if noise == "same" else "steps",
            save_steps=SAVED_AT,
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            seed=7,
        )
        rank, processes = arguments.process_index, arguments.world_size
        own = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
        run = trainer(adapted, arguments, train_dataset=images(24, seed=1), callbacks=[merging, stopping])
        checkpoint = folder / task / f"checkpoint-{SAVED_AT}"
        if noise == "own":
            torch.manual_seed(100 + rank)
        with SameNoise(own) if noise == "same" else nullcontext():
            run.train(resume_from_checkpoint=str(checkpoint) if resume else None)
        told |= {f"usage/{task}/{name}": counts for name, counts in adapted.expert_usage().items()}
        for step, merges in merging.merges:
            told |= {f"merge/{task}/{step}/{name}": torch.tensor(merge) for name, merge in merges.items()}
        told |= {f"stop/{task}/{name}": torch.tensor(step) for name, step in stopping.stops.items()}
    without = ["logits_per_text", "text_model_output", "vision_model_output", "text_embeds", "image_embeds"]
    predicted = run.predict(images(10, seed=2), ignore_keys=without)  # of which the last batches are not full
    told["predicted"] = torch.as_tensor(predicted.predictions)
    told["loss"] = torch.tensor(run.evaluate(images(2 * IMAGES, seed=3), ignore_keys=without)["eval_loss"])
    told |= {name: tensor for name, tensor in adapted.state_dict().items() if "moe_lora" in name}
    file = folder / f"{'resumed_' if resume else ''}rank_{rank}.safetensors"
    save_file({name: t.detach().clone().contiguous() for name, t in told.items()}, file)
    run.accelerator.end_training()


def assert_processes_agree(first, second):
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]) or key.endswith(".usage"), f"{key} differs between the processes"


@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_two_processes_come_to_what_one_does(kind, tmp_path):
    for processes, name in ((1, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        run_together(processes, train, kind, "same", tmp_path / name)
    first, second = (load_file(tmp_path / "two" / f"rank_{rank}.safetensors") for rank in (0, 1))
    expected = load_file(tmp_path / "one" / "rank_0.safetensors")
    assert_processes_agree(first, second)
    steps = {tuple(key.split("/")[1:3]) for key in expected if key.startswith("merge/")}
    assert steps == {*(("a", step) for step in ("7", "14", "21", "28")), *(("b", step) for step in ("7", "14"))}
    assert {int(value) for key, value in expected.items() if key.startswith("stop/a")} == {25}
    assert all(2 <= value.sum() <= 4 for key, value in expected.items() if key.endswith("frozen"))
    expected |= {  # every process counts for all prompts
        key: 2 * counts for key, counts in expected.items() if key.startswith("usage/") and "text_model" in key
    }
    own = {key for key in expected if key.endswith(".usage")}  # of a part of the images; what is under `usage/` again
    first, expected = ({key: told[key] for key in told.keys() - own} for told in (first, expected))
    assert_alike(f"Trainer, {kind}, two processes and one", first, expected)


@pytest.mark.slow
def test_two_processes_resume_to_what_they_come_to_without_a_stop(tmp_path):
    """Each draws noise of its own, and goes on with that where it stopped."""
    folder = tmp_path / "two"
    folder.mkdir()
    run_together(2, train, "clip", "own", folder)
    run_together(2, train, "clip", "own", folder, True)
    for rank in (0, 1):
        straight, resumed = (load_file(folder / f"{name}rank_{rank}.safetensors") for name in ("", "resumed_"))
        assert straight.keys() == resumed.keys()
        for key, tensor in straight.items():
            assert torch.equal(tensor, resumed[key]), key
    assert_processes_agree(*(load_file(folder / f"rank_{rank}.safetensors") for rank in (0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (2, 1)])
def test_other_processes_resume_to_what_the_same_come_to(first, then, tmp_path):
    """Nothing is drawn. Of one tower, since each process counts for all prompts."""
    run_together(first, train, "classifier", "none", tmp_path)
    run_together(then, train, "classifier", "none", tmp_path, True)
    resumed, straight = (load_file(tmp_path / f"{name}rank_0.safetensors") for name in ("resumed_", ""))
    own = {key for key in straight if key.endswith(".usage")}
    resumed, straight = ({key: told[key] for key in told.keys() - own} for told in (resumed, straight))
    assert_alike(f"Trainer, {first} then {then} processes and {first}", resumed, straight)
