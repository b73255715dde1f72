"""Let a CLIP learn a stream of image tasks, and see what it keeps.

    accelerate launch examples/mtil.py                     # the embedded benchmark and its small pretrained CLIP
    accelerate launch examples/mtil.py --suite mtil --model openai/clip-vit-base-patch16 --mixed_precision bf16
    accelerate launch examples/mtil.py --suite my_images --model openai/clip-vit-base-patch16 --mixed_precision bf16

`mtil` are the benchmark's 11 data sets, from the Hub (docs/mtil.md). `--suite` also takes a folder
`<root>/<task>/<train|test>/<class>/*.jpg`. An interrupted run goes on with `--resume`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from transformers import CLIPModel, CLIPProcessor, HfArgumentParser

from peft_moe_merge.mtil.checkpoint import newest
from peft_moe_merge.mtil.clip import load_clip, small_clip
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.push import prepare_push, push_adapter
from peft_moe_merge.mtil.report.card import METHOD
from peft_moe_merge.mtil.report.html import write_report
from peft_moe_merge.mtil.report.tables import print_results
from peft_moe_merge.mtil.results import add_run, empty_results, extended_results, run_result, write_results
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.settings import setting
from peft_moe_merge.mtil.stream import StreamSettings, run_stream

# what may differ between calls whose runs end up in one table
FREE = (
    "methods",
    "seeds",
    "data_dir",
    "output_dir",
    "log_with",
    "eval_batch_size",
    "num_workers",
    "push_to_hub",
    "license",
)


@dataclass
class RunSettings:
    """What to run, and where."""

    suite: str = setting(
        "mini", "'mini', the embedded benchmark; 'digits'; 'mtil', from the Hub; or a folder of tasks"
    )
    tasks: list[str] | None = setting(None, "which tasks of the suite, in which order; default: all")
    order: str = setting("I", "of the tasks: I, II or random")
    few_shot: int | None = setting(None, "training images per class; default: all")
    data_dir: str | None = setting(None, "mtil: folder with local copies, <data_dir>/<task>, in place of the Hub")
    allow_size_mismatch: bool = setting(False, "mtil: go on with other numbers of images than the benchmark's")
    model: str | None = setting(None, "a pretrained CLIP, folder or Hub id; 'untrained': a small one; default: mini's")
    methods: list[str] = setting(
        ["zero_shot", "finetune", "moe_adapters", "moe_lora_merge"], f"any of {', '.join(METHODS)}"
    )
    seeds: list[int] = setting([42], "one run each")
    output_dir: str = setting("runs/mtil", "where checkpoints, results and pictures go")
    resume: bool = setting(False, "go on with the run in the output folder")
    stop_after: int | None = setting(None, "leave after so many tasks; --resume goes on")
    mixed_precision: str | None = setting(None, "no, bf16 or fp16; default: what `accelerate launch` was told, or no")
    cpu: bool = setting(False, "do not use a GPU")
    push_to_hub: str | None = setting(None, "user/name: when done, push the adapter of moe_lora_merge, first seed")
    license: str = setting("apache-2.0", "of the adapter that is pushed")
    log_with: str | None = setting(None, "tracker for losses and accuracies: tensorboard or wandb")

    def __post_init__(self):
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise ValueError(f"Unknown methods {unknown}; there are {list(METHODS)}.")
        if self.push_to_hub and METHOD not in self.methods:
            raise ValueError(f"`push_to_hub` publishes the adapter of {METHOD}, but the methods are {self.methods}.")


def build_clip(run: RunSettings, tasks: list[Task]) -> tuple[CLIPModel, CLIPProcessor]:
    if run.model != "untrained":
        return load_clip(run.model or mini_clip_path())
    return small_clip(prompt for task in tasks for template in task.templates for prompt in task.prompts(template))


def main() -> None:
    parser = HfArgumentParser((RunSettings, StreamSettings, MethodSettings, SelectorSettings), description=__doc__)
    run, stream_settings, method_settings, selector_settings = parser.parse_args_into_dataclasses()
    output_dir = Path(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        cpu=run.cpu,
        log_with=run.log_with,
        project_dir=output_dir,
        # a step trains only the experts that were selected in it
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if run.push_to_hub and accelerator.is_main_process:
        run.push_to_hub = prepare_push(run.push_to_hub)
    if run.log_with:
        accelerator.init_trackers("mtil")
    with accelerator.main_process_first():  # the others find in the cache what it has downloaded
        tasks = load_suite(
            run.suite,
            run.tasks,
            order=run.order,
            few_shot=run.few_shot,
            seed=run.seeds[0],
            progress=accelerator.is_main_process,
            data_dir=run.data_dir,
            allow_size_mismatch=run.allow_size_mismatch,
        )
    stream_settings = stream_settings.for_tasks(tasks)
    settings = {**asdict(run), **asdict(stream_settings), **asdict(method_settings), **asdict(selector_settings)}
    settings["mixed_precision"] = accelerator.mixed_precision
    del settings["resume"], settings["stop_after"]  # a resumed run leaves what an undisturbed one does
    results = extended_results(
        output_dir / "results.json",
        empty_results(run.suite, [task.name for task in tasks], settings),
        may_differ=FREE,
    )

    for name in run.methods:
        for seed in run.seeds:
            progress = run_stream(
                tasks,
                lambda name=name: METHODS[name](*build_clip(run, tasks), method_settings),
                stream_settings,
                output_dir / name / f"seed_{seed}",
                accelerator,
                seed=seed,
                resume=run.resume,
                stop_after=run.stop_after,
                selection=selector_settings,
            )
            if len(progress.matrix) == len(tasks):
                add_run(results, name, run_result(seed, progress))
            else:
                accelerator.print(f"{name}, seed {seed}: {len(progress.matrix)} of {len(tasks)} tasks done")

    accelerator.wait_for_everyone()  # no process may still be reading the results of before
    if accelerator.is_main_process and results["methods"]:
        write_results(output_dir / "results.json", results)
        print_results(results)
        print(f"results: {output_dir / 'results.json'}")
        print(f"report:  {write_report(results, output_dir)[-1]}, pictures beside it in figures/")
        if run.push_to_hub and run.stop_after is None:
            seed, (_, processor) = run.seeds[0], build_clip(run, tasks)
            checkpoint = newest(output_dir / METHOD / f"seed_{seed}")
            address = push_adapter(run.push_to_hub, checkpoint, tasks, processor, results, seed, run.license)
            print(f"adapter: {address}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
