"""Which frozen features should have a say in the class, on images that are neither trained on nor tested on.

    python benchmarks/fusion.py                                                    # the embedded benchmark
    python benchmarks/fusion.py --suite <folder> --model <folder> --batch_size 64  # images of your own

A fifth of each task's training images is held out. `moe_lora_warm` learns all tasks, one after another, and Gaussians per
class are fitted on what plain CLIP sees, at several depths, with one covariance for all tasks or one for each. Printed is the accuracy on
the held-out images with the task known, mean over tasks: of the Gaussians alone, fused with plain CLIP, and fused with the
task's experts. `moe_lora_fused` and `slda` take the features that were best so, at a width that is no burden.

With `--routed` there are also Gaussians on what each task's own experts make of its images, alone and beside the others.
`--shrinkage` names the shares to choose from: a task's own covariance, which is of few images, wants more than the default has.
"""

import argparse
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from torch import Tensor

from peft_moe_merge.inference.zero_shot import prompts_of
from peft_moe_merge.mtil.checkpoint import Progress
from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.mtil.methods import METHODS, MethodSettings
from peft_moe_merge.mtil.methods.moe_lora_warm import MoELoraWarm
from peft_moe_merge.mtil.stream import Stream, StreamSettings
from peft_moe_merge.selection import NONE, Depths, DiscriminantSelector, FeatureSource, ImageFeatures, fuse
from peft_moe_merge.selection.features import TOKENS

COVARIANCES = {"one for all tasks": 1.0, "one for each": 0.0}


def sources(blocks: int) -> dict[str, FeatureSource]:
    """Name what plain CLIP's image tower offers; tokens are the class token, and mean and deviation of the others."""
    depths = {"tokens after block 2": (2,), "the last": (blocks,), "half and the last": (blocks // 2, blocks)}
    return {name: Depths(at, tuple(TOKENS)) for name, at in depths.items()} | {"image embedding": ImageFeatures()}


def learn(tasks: list[Task], options: argparse.Namespace) -> MoELoraWarm:
    """Let the experts learn all tasks."""
    set_seed(options.seed)
    method = METHODS["moe_lora_warm"](*load_clip(options.model), MethodSettings())
    training = StreamSettings(steps=options.steps, batch_size=options.batch_size, lr=[1e-3])
    stream = Stream(tasks, training, Accelerator(cpu=True))
    for position in range(len(tasks)):
        stream.train(method, position, options.seed, Progress({}))
    method.model.eval()
    return method


@torch.no_grad()
def logits(method: MoELoraWarm, task: Task, route: int) -> Tensor:
    """Compare the held-out images of a task with its classes, both encoded by a route: B x C."""
    method.set_task(None if route == NONE else task.name)
    prompts = prompts_of(task.class_names, task.templates)
    classes_CP = method.encode_classes(prompts, torch.device("cpu"))
    batches = eval_batches(task.test, method.processor.image_processor, batch_size=256)
    parts = (method.routed_image_features(b["pixel_values"], torch.full((len(b["labels"]),), route)) for b in batches)
    return method.model.logit_scale.exp() * torch.cat(list(parts)) @ classes_CP.T


@torch.no_grad()
def seen(method: MoELoraWarm, source: FeatureSource, rows: Dataset, route: int = NONE) -> tuple[Tensor, Tensor]:
    """Return features of images as a route has them, and their labels."""
    batches = list(eval_batches(rows, method.processor.image_processor, batch_size=256))
    features = []
    for batch in batches:
        with method.model.route(torch.full((len(batch["labels"]),), route)):
            features.append(source(method.model.get_base_model(), batch["pixel_values"]))
    return torch.cat(features), torch.cat([batch["labels"] for batch in batches])


def opinions(
    tasks: list[Task], source: FeatureSource, train: list, test: list, share: float, shrinkage: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """Fit Gaussians on all tasks; return each task's `class_posterior` of its held-out images."""
    selector = DiscriminantSelector(source, means="classes", shared=(share,), shrinkage=shrinkage)
    for task, images in zip(tasks, train, strict=True):
        selector.fit(task.name, [images])
    return [selector.class_posterior(features_BF, t) for t, (features_BF, _) in enumerate(test)]


def accuracy(scores_BC: Tensor, labels_B: Tensor) -> float:
    return 100.0 * (scores_BC.argmax(dim=1) == labels_B).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--model", default=str(mini_clip_path()))
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--routed", action="store_true", help="Gaussians on what the experts make of images, too")
    parser.add_argument("--shrinkage", type=float, nargs="+", default=DiscriminantSelector().shrinkage)
    options = parser.parse_args()
    tasks = []
    for task in load_suite(options.suite, options.tasks):
        parts = task.train.train_test_split(test_size=0.2, seed=options.seed, stratify_by_column="label")
        tasks.append(replace(task, train=parts["train"], test=parts["test"]))
    method = learn(tasks, options)
    plain = [logits(method, task, NONE) for task in tasks]
    experts = [logits(method, task, position) for position, task in enumerate(tasks)]

    table = Table(title=f"held-out accuracy in %, mean over {len(tasks)} tasks, seed {options.seed}")
    for column in ("features", "covariance", "width", "Gaussians alone", "with plain CLIP", "with experts"):
        table.add_column(column, justify="left" if column in ("features", "covariance") else "right")
    labels = [torch.tensor(task.test["label"]) for task in tasks]

    def mean_accuracy(scores: list[Tensor]) -> str:
        return f"{sum(map(accuracy, scores, labels)) / len(tasks):.1f}"

    table.add_row("none", "", "", "", mean_accuracy(plain), mean_accuracy(experts))
    blocks = len(method.model.get_base_model().vision_model.encoder.layers)
    offered = sources(blocks)
    tried = [(name, source, False) for name, source in offered.items()]
    if options.routed:
        tried += [(name, offered[name], True) for name in ("the last", "image embedding")]
    opinion = {}
    for name, source, routed in tried:
        train, test = (
            [seen(method, source, getattr(task, split), t if routed else NONE) for t, task in enumerate(tasks)]
            for split in ("train", "test")
        )
        for covariance, share in COVARIANCES.items():
            known = opinion[name, share, routed] = opinions(tasks, source, train, test, share, options.shrinkage)
            alone = [torch.full_like(plain[t], -torch.inf).index_copy(1, *found) for t, found in enumerate(known)]
            fused = [[fuse(own[t], *found) for t, found in enumerate(known)] for own in (plain, experts)]
            columns = [str(test[0][0].shape[1]), *map(mean_accuracy, (alone, *fused))]
            table.add_row(f"{name}, by the experts" if routed else name, covariance, *columns)
            if routed:
                taken = opinion["the last", 1.0, False]  # by `moe_lora_fused`
                both = [fuse(own, *found) for own, found in zip(fused[1], taken, strict=True)]
                table.add_row("the same, and the last of plain CLIP", covariance, "", "", "", mean_accuracy(both))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
