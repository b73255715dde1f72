"""Let a CLIP learn a stream of image tasks, and see what it keeps.

    accelerate launch examples/mtil.py                     # the embedded benchmark and its small pretrained CLIP
    accelerate launch examples/mtil.py --suite mtil --model openai/clip-vit-base-patch16 --mixed_precision bf16
    accelerate launch examples/mtil.py --suite my_images --model openai/clip-vit-base-patch16 --mixed_precision bf16

`mtil` are the benchmark's 11 data sets, from the Hub (docs/mtil.md). `--suite` also takes a folder
`<root>/<task>/<train|test>/<class>/*.jpg`. An interrupted run goes on with `--resume`.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from transformers import HfArgumentParser

from peft_moe_merge.mtil.checkpoint import newest
from peft_moe_merge.mtil.clip import ModelSettings
from peft_moe_merge.mtil.data.suites import DataSettings
from peft_moe_merge.mtil.experiment import Experiment, has_experts_to_watch, run_folder
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.push import prepare_push, push_adapter
from peft_moe_merge.mtil.report.card import PUBLISHED, model_card, published
from peft_moe_merge.mtil.report.closing import closing
from peft_moe_merge.mtil.report.html import write_report
from peft_moe_merge.mtil.report.tables import print_results
from peft_moe_merge.mtil.results import add_run, extended_results, run_result, write_results
from peft_moe_merge.mtil.selection import SelectorSettings
from peft_moe_merge.mtil.settings import check_at_least, check_choices, renamed_options, setting
from peft_moe_merge.mtil.stream import StreamSettings


@dataclass
class RunSettings:
    """Which runs, and where. None of it shapes what a run comes to but its seed, device and precision."""

    methods: list[str] = setting(
        ["zero_shot", "finetune", "moe_adapters", "moe_lora_merge"], "which ones", choices=METHODS
    )
    seeds: list[int] = setting([42], "one run each")
    output_dir: str = setting("runs/mtil", "where checkpoints, results and pictures go")
    resume: bool = setting(False, "go on with the runs in the output folder")
    stop_after: int | None = setting(None, "leave after so many tasks; --resume goes on")
    expert_figures: bool = setting(
        False, "note what experts do while they train, and show it in the report: selections, merges, growth"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(
        None, "default: what `accelerate launch` was told, or no"
    )
    cpu: bool = setting(False, "do not use a GPU")
    push_to_hub: str | None = setting(None, "user/name: when done, push an adapter of the first seed")
    push_method: str | None = setting(
        None, "whose adapter; default: the first of these that is run", choices=list(PUBLISHED)
    )
    license: str = setting("apache-2.0", "of the adapter that is pushed")
    log_with: str | None = setting(None, "tracker for losses and accuracies: tensorboard or wandb")

    def __post_init__(self):
        check_choices(self, "methods", METHODS)
        check_at_least(self, 1, "stop_after")
        if self.push_to_hub:
            self.push_method = self.push_method or published(self.methods)
            if self.push_method not in self.methods:
                one = self.push_method or f"one of {list(PUBLISHED)}"
                raise ValueError(
                    f"`push_to_hub` publishes the adapter of {one}, but the methods are {self.methods}: add it."
                )
        if self.expert_figures and not any(map(has_experts_to_watch, self.methods)):
            watched = ", ".join(filter(has_experts_to_watch, METHODS))
            raise ValueError(
                f"`expert_figures` shows experts, and none of the methods {self.methods} has any: add one of {watched}, or "
                "leave the flag out."
            )


def main() -> None:
    groups = (RunSettings, DataSettings, ModelSettings, StreamSettings, MethodSettings, SelectorSettings)
    parser = HfArgumentParser(groups, description=__doc__)
    run, *settings = parser.parse_args_into_dataclasses(renamed_options(sys.argv[1:]))
    output_dir = Path(run.output_dir)
    accelerator = Accelerator(
        mixed_precision=run.mixed_precision,
        cpu=run.cpu,
        log_with=run.log_with,
        project_dir=output_dir,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),  # of pinned batches, where there is a GPU
        # a step trains only the experts that were selected in it
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    experiment = Experiment(*settings, accelerator)
    experiment.check(run.methods, run.seeds, output_dir, resume=run.resume)
    told = asdict(run)
    del told["resume"], told["stop_after"]  # a resumed run leaves what an undisturbed one does
    results = extended_results(output_dir / "results.json", experiment.results(**told))
    if run.push_to_hub and accelerator.is_main_process:
        run.push_to_hub = prepare_push(run.push_to_hub)
    if run.log_with:
        accelerator.init_trackers("mtil")

    for name in run.methods:
        for seed in run.seeds:
            how = {"resume": run.resume, "stop_after": run.stop_after, "expert_figures": run.expert_figures}
            progress = experiment.run(name, seed, output_dir, **how)
            if len(progress.matrix) == len(experiment.tasks):
                add_run(results, name, run_result(seed, progress))
            else:
                done = f"{len(progress.matrix)} of {len(experiment.tasks)} tasks done"
                accelerator.print(f"{name}, seed {seed}: {done}")

    accelerator.wait_for_everyone()  # no process may still be reading the results of before
    if accelerator.is_main_process and results["methods"]:
        write_results(output_dir / "results.json", results)
        print_results(results)
        print(f"results: {output_dir / 'results.json'}")
        report = write_report(results, output_dir)[-1]
        print(f"report:  {report}, pictures beside it in figures/")
        if run.push_to_hub and run.stop_after is None:
            seed, (_, processor) = run.seeds[0], experiment.build_clip()
            checkpoint = newest(run_folder(output_dir, run.push_method, seed))
            card = model_card(results, run.push_to_hub, run.push_method, seed, run.license)
            address = push_adapter(run.push_to_hub, checkpoint, experiment.tasks, processor, card)
            print(f"adapter: {address}")
        print("", *closing(results, report), sep="\n")
    accelerator.end_training()


if __name__ == "__main__":
    main()
