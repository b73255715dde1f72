"""What a stream has learnt, one LoRA per task, merged into one WEMoE."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.inference.zero_shot import class_features, prompts_of
from peft_moe_merge.model_merging.sources import LoraTensors, load_lora, lora_tensors
from peft_moe_merge.tuners.wemoe import WEMoEConfig, merge_finetuned

from ..checkpoint import newest
from ..data.task import Task

LEARNT = "learnt.json"


def learnt_tasks(run: Path) -> list[str]:
    """Return the names of the tasks that a run has learnt.

    Raises:
        ValueError: the folder is not of a run of `lora_per_task` or `moe_lora_pool`.
    """
    checkpoint = newest(Path(run))
    if checkpoint is not None and (checkpoint / LEARNT).is_file():
        return json.loads((checkpoint / LEARNT).read_text())
    tasks = None
    if checkpoint is not None and (checkpoint / "adapter_config.json").is_file():
        tasks = json.loads((checkpoint / "adapter_config.json").read_text()).get("tasks")
    if tasks:
        return tasks
    raise ValueError(
        f"{str(run)!r} holds no tasks' LoRAs: give the folder of one run of `lora_per_task`, or of `moe_lora_pool` "
        "that has come to its end, such as runs/mtil/lora_per_task/seed_42."
    )


def task_loras(run: Path, clip: CLIPModel) -> Iterator[tuple[str, PeftModel]]:
    """Yield each task's name and its LoRA beside `clip`, one at a time.

    Args:
        run: the folder of one run; its newest checkpoint counts.
        clip: what the stream started from; it is left as it is.

    Raises:
        ValueError: see `learnt_tasks`; or a task of a pool is no LoRA, for the reason that is given.
    """
    tasks, checkpoint = learnt_tasks(run), newest(Path(run))
    if (checkpoint / LEARNT).is_file():
        for position, task in enumerate(tasks):
            yield task, load_lora(clip, checkpoint / f"task_{position}")
        return
    pool = PeftModel.from_pretrained(copy.deepcopy(clip), checkpoint)
    for task in tasks:
        yield task, pool.export_lora(task)


@torch.no_grad()
def merge_stream(
    run: Path, clip: CLIPModel, processor: CLIPProcessor, tasks: Sequence[Task], config: WEMoEConfig
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """Merge the vision towers of a run's tasks into one WEMoE, and encode each task's classes by its own text tower.

    LoRAs are taken by their factors. With `config.rank` at least theirs the merge is exact and builds no task vector of
    an MLP.

    Args:
        run: the folder of one run of `lora_per_task`, or of `moe_lora_pool` whose tasks are LoRAs.
        clip: what the stream started from, which the merged model wraps.
        processor: its processor.
        tasks: with the class names of all that the run has learnt.
        config: of the WEMoE.

    Returns:
        The merged model, and for each task its classes' normalised text features, `[C, D]`.

    Raises:
        ValueError: see `task_loras`; or a learnt task is not among `tasks`.
    """
    known = {task.name: task for task in tasks}
    if missing := [name for name in learnt_tasks(run) if name not in known]:
        raise ValueError(f"the run has learnt {missing}, whose classes are not known: there are {list(known)}.")
    parameters = {name: p.detach() for name, p in clip.named_parameters(remove_duplicate=False)}
    vision: dict[str, LoraTensors] = {}
    heads: dict[str, torch.Tensor] = {}
    for name, model in task_loras(run, clip):
        prompts = prompts_of(known[name].class_names, known[name].templates)
        heads[name] = class_features(model.get_base_model().eval(), processor.tokenizer, prompts)
        factors = lora_tensors(model, parameters).factors
        vision[name] = LoraTensors(parameters, {n: f for n, f in factors.items() if n.startswith("vision_model.")})
    return merge_finetuned(clip, vision, config), heads
