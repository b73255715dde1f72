"""Fine-tune a CLIP on several tasks, merge the copies into one model in every way there is, and compare.

    accelerate launch examples/wemoe.py --model openai/clip-vit-base-patch32 --suite my_images --seeds 0 1 2
    accelerate launch examples/wemoe.py                       # the embedded benchmark with its small CLIP
    accelerate launch examples/wemoe.py --from_stream runs/mtil/lora_per_task/seed_42     # merge what a stream has learnt

`--suite` takes `mini`, `digits` or a folder `<root>/<task>/<train|test>/<class>/*.jpg`. An interrupted run goes on when the same
command is given again. `--from_stream` takes the folder of one run of `lora_per_task`, or of `moe_lora_pool` with one expert per
task (`--experts_per_task 1`), merges the tasks' LoRAs, adapts the routers to training images without their labels, and writes the
adapter, the tasks' class texts and accuracies to `--output_dir`.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor, HfArgumentParser

from peft_moe_merge import Adaptation, WEMoEConfig, adapt_routers
from peft_moe_merge.files import whole
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.mini import load_task, mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.model_merging.corruptions import CORRUPTIONS
from peft_moe_merge.mtil.model_merging.finetune import accuracy
from peft_moe_merge.mtil.model_merging.from_stream import learnt_tasks, merge_stream
from peft_moe_merge.mtil.model_merging.images import batches, load_images
from peft_moe_merge.mtil.model_merging.report import print_report, write_report
from peft_moe_merge.mtil.model_merging.study import METHODS, Study, StudySettings
from peft_moe_merge.mtil.results import empty_results, write_results
from peft_moe_merge.mtil.settings import check_choices, setting


@dataclass
class RunSettings:
    """What to run, and where."""

    suite: str = setting("mini", "'mini', the embedded benchmark; 'digits'; or a folder of tasks")
    model: str | None = setting(None, "a pretrained CLIP, folder or Hub id; default with 'mini': its own small one")
    tasks: list[str] | None = setting(None, "tasks to fine-tune on and merge; default: all but the held-out ones")
    from_stream: str | None = setting(
        None, "folder of a stream's run whose tasks' LoRAs are merged; nothing is fine-tuned"
    )
    rank: int = setting(16, "with --from_stream: of the task vectors; exact from the LoRAs' own on")
    held_out: list[str] = setting([], "tasks that are only tested on")
    train_per_class: int = setting(64, "with 'mini', images per class to train on and adapt to")
    methods: list[str] = setting(list(METHODS), "which ones", choices=METHODS)
    corruptions: list[str] = setting([], "of the test images, for robust_methods", choices=CORRUPTIONS)
    robust_methods: list[str] = setting(
        ["pretrained", "task_arithmetic", "adamerging", "wemoe", "wemoe_mi", "wemoe_prior"],
        "methods to run on corrupted images",
        choices=METHODS,
    )
    seeds: list[int] = setting([0], "one run each")
    output_dir: str = setting("runs/wemoe", "where models, results and the report go")
    mixed_precision: Literal["no", "bf16", "fp16"] = setting("no", "for fine-tuning")
    cpu: bool = setting(False, "do not use a GPU")

    def __post_init__(self):
        for name, known in (("methods", METHODS), ("robust_methods", METHODS), ("corruptions", CORRUPTIONS)):
            check_choices(self, name, known)


def load_tasks(run: RunSettings, names: list[str] | None) -> list[Task]:
    tasks = load_suite(run.suite, names)
    if run.suite != "mini":
        return tasks
    # Drawn tasks can have more images than a stream takes of them.
    return [replace(t, train=load_task(t.name, "train", train_per_class=run.train_per_class)) for t in tasks]


def build_clip(run: RunSettings) -> tuple[CLIPModel, CLIPProcessor]:
    if run.model is not None:
        return load_clip(run.model)
    if run.suite != "mini":
        raise ValueError(f"--suite {run.suite} needs --model, a pretrained CLIP: a folder or Hub id.")
    return load_clip(mini_clip_path())


def from_stream(run: RunSettings, settings: StudySettings, accelerator: Accelerator) -> None:
    """Merge a stream's LoRAs into one WEMoE, adapt it, and save it."""
    clip, processor = build_clip(run)
    clip = clip.to(accelerator.device).eval()
    names = learnt_tasks(Path(run.from_stream))
    tasks = load_tasks(run, names)
    config = WEMoEConfig(rank=run.rank, scaling=settings.scaling)
    images = [load_images(task, clip, processor) for task in tasks]
    plain = {i.name: accuracy(clip, i.test, i.head_CD) for i in images}
    model, heads = merge_stream(Path(run.from_stream), clip, processor, tasks, config)

    def accuracies() -> dict[str, float]:
        return {i.name: accuracy(model, i.test, heads[i.name]) for i in images}

    before = accuracies()
    how = Adaptation(settings.adapt_steps, "mutual_information", settings.adapt_lr)
    unlabelled = {i.name: batches(i.adapt, settings.adapt_batch_size) for i in images}
    adapt_routers(model, unlabelled, how, heads=heads, progress=accelerator.is_main_process)
    output_dir = Path(run.output_dir)
    model.save_pretrained(output_dir / "adapter")
    with whole(output_dir / "heads.safetensors") as partial:
        save_file({name: head_CD.contiguous() for name, head_CD in heads.items()}, partial)
    found = {"zero_shot": plain, "merged": before, "adapted": accuracies()}
    write_results(output_dir / "merged.json", {"tasks": names, "rank": run.rank, "accuracy": found})
    for what, row in found.items():
        print(f"{what:10s}", "  ".join(f"{name} {value:.1f}" for name, value in row.items()))
    print(f"adapter: {output_dir / 'adapter'}, class texts: {output_dir / 'heads.safetensors'}")


def main() -> None:
    run, settings = HfArgumentParser((RunSettings, StudySettings), description=__doc__).parse_args_into_dataclasses()
    accelerator = Accelerator(mixed_precision=run.mixed_precision, cpu=run.cpu)
    if run.from_stream is not None:
        return from_stream(run, settings, accelerator)
    build_clip(run)  # fails now rather than after loading the images
    held_out = load_tasks(run, run.held_out) if run.held_out else []
    tasks = [task for task in load_tasks(run, run.tasks) if task.name not in run.held_out]

    results = empty_results(run.suite, [task.name for task in tasks], {**asdict(run), **asdict(settings)})
    del results["methods"]
    output_dir = Path(run.output_dir)
    study = Study(tasks, held_out, lambda: build_clip(run), settings, accelerator)
    results["runs"] = [
        study.run(
            output_dir / f"seed_{seed}",
            methods=run.methods,
            robust_methods=run.robust_methods,
            corruptions=run.corruptions,
            seed=seed,
        )
        for seed in run.seeds
    ]
    write_results(output_dir / "results.json", results)
    print_report(results)
    print(f"results: {output_dir / 'results.json'}")
    print(f"report:  {write_report(results, output_dir)[-1]}, its picture beside it")


if __name__ == "__main__":
    main()
