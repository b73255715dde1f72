"""The comparison: individual models, joint training, every merge; then tasks and images that nobody trained on."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.files import whole
from peft_moe_merge.model_merging.adaptation import Adaptation
from peft_moe_merge.model_merging.logits import zero_shot_logits
from peft_moe_merge.model_merging.static import STATIC_MERGES, merge_static
from peft_moe_merge.tuners.wemoe import WEMoEConfig, adapt_routers, merge_finetuned
from peft_moe_merge.tuners.wemoe.context import recorded_gates

from ..checkpoint import GO_ON
from ..data.task import Task
from ..fingerprint import differences, fingerprint
from ..results import write_results
from ..settings import check_at_least, check_positive, setting
from .corruptions import corrupt
from .finetune import accuracy, finetune
from .images import TaskImages, batches, load_images

TSV = {"without_interference": True, "scaling": 1.0}
WEMOE: dict[str, tuple[dict[str, Any], str | None]] = {
    "wemoe": ({}, "entropy"),
    "wemoe_1_layer": ({"router_depth": 1}, "entropy"),
    "e_wemoe": ({"shared_router": True, "sparsity": 0.9}, "entropy"),
    "wemoe_mi": ({}, "mutual_information"),
    "wemoe_prior": ({}, "entropy_with_prior"),
    "e_wemoe_mi": ({"shared_router": True, "sparsity": 0.9}, "mutual_information"),
    "wemoe_rank_32_mi": ({"rank": 32}, "mutual_information"),
    "wemoe_labels": ({}, "cross_entropy"),
    "e_wemoe_labels": ({"shared_router": True, "sparsity": 0.9}, "cross_entropy"),
    "wemoe_tsv_mi": (TSV, "mutual_information"),
    "wemoe_tsv_labels": (TSV, "cross_entropy"),
    "smile": ({"gates": "projection", "rank": 32, "gate_rank": 16}, None),
}
"""Adapters by name: what differs from the default configuration, and the loss they adapt with. `_mi` and `_labels` are not
published: mutual information, or the labels of a few images, in place of entropy. Nor is `_tsv`: tasks' orthogonal parts in
place of task vectors."""

ADAMERGING: dict[str, tuple[dict[str, Any], str]] = {
    "adamerging": ({}, "entropy"),
    "adamerging_mi": ({}, "mutual_information"),
    "adamerging_labels": ({}, "cross_entropy"),
    "adamerging_tsv_mi": (TSV, "mutual_information"),
    "adamerging_tsv_labels": (TSV, "cross_entropy"),
}
"""Likewise."""

STATIC = tuple(dict.fromkeys((*STATIC_MERGES, *ADAMERGING)))
LOSSES = {name: loss for name, (_, loss) in {**WEMOE, **ADAMERGING}.items() if loss is not None}
"""What each method that adapts adapts with."""

REFERENCES = ("pretrained", "individual", "multitask")
METHODS = (*REFERENCES, *STATIC, *WEMOE)


@dataclass
class StudySettings:
    """How long everything trains. Nothing here is chosen for a method's sake."""

    finetune_steps: int = setting(150, "optimizer steps per task")
    finetune_lr: float = setting(1e-4, "first learning rate of fine-tuning")
    batch_size: int = setting(32, "images per fine-tuning step")
    adapt_steps: int = setting(150, "steps of test-time adaptation, for AdaMerging too")
    adapt_lr: float = setting(1e-3, "learning rate of test-time adaptation, for AdaMerging too")
    adapt_lrs: list[str] = setting([], "method=rate for methods that take another one, such as wemoe=1e-4")
    adapt_batch_size: int = setting(16, "images per task and adaptation step")
    labels_per_class: int = setting(5, "images of each class whose labels the methods `*_labels` see")
    scaling: float = setting(0.3, "weight of task vectors")
    transductive: bool = setting(False, "adapt on the test images themselves, as the papers do")

    def __post_init__(self):
        check_at_least(self, 1, "finetune_steps", "batch_size", "adapt_steps", "adapt_batch_size")
        check_at_least(self, 1, "labels_per_class")
        check_positive(self, "finetune_lr", "adapt_lr", "scaling")
        self.rates  # noqa: B018 - values are checked when they are given

    @property
    def rates(self) -> dict[str, float]:
        """The adaptation rates of `adapt_lrs` by method.

        Raises:
            ValueError: an entry is not `method=rate`, with a method that adapts and a positive rate.
        """
        rates = {}
        for entry in self.adapt_lrs:
            method, _, rate = entry.partition("=")
            try:
                rates[method] = float(rate)
            except ValueError:
                rates[method] = 0.0
            if method not in LOSSES or not rates[method] > 0:
                raise ValueError(
                    f"`adapt_lrs` has {entry!r}; expected method=rate with a positive rate, such as wemoe=1e-4, and one of "
                    f"{list(LOSSES)}."
                )
        return rates


@dataclass(frozen=True)
class Run:
    """One seed's material, as every method gets it."""

    clip: CLIPModel
    processor: CLIPProcessor
    tasks: tuple[TaskImages, ...]
    held_out: tuple[TaskImages, ...]
    finetuned: dict[str, Path]
    settings: StudySettings
    accelerator: Accelerator
    seed: int

    @property
    def heads(self) -> dict[str, torch.Tensor]:
        return {task.name: task.head_CD.to(self.accelerator.device) for task in self.tasks}

    def adaptation(
        self, method: str, change: Callable[[TensorDataset], TensorDataset] = lambda images: images
    ) -> dict[str, Any]:
        """Return loaders of what a method adapts to: the adaptation split, or with `transductive` the test split.

        Of either only a few images a class for a method that learns from labels.
        """
        split = "test" if self.settings.transductive else "adapt"
        loaders = {}
        for task in self.tasks:
            images = getattr(task, split)
            if LOSSES.get(method) == "cross_entropy":
                images = few(images, self.settings.labels_per_class)
            loaders[task.name] = batches(change(images), self.settings.adapt_batch_size)
        return loaders

    def how(self, method: str) -> Adaptation:
        """Return how a method adapts."""
        s = self.settings
        schedule = "constant" if method in ADAMERGING else "cosine"
        return Adaptation(s.adapt_steps, LOSSES[method], s.rates.get(method, s.adapt_lr), schedule, self.seed)

    def only(self, names: Sequence[str]) -> Run:
        """Return the same with some of the tasks; the others are held out."""
        others = tuple(task for task in self.tasks if task.name not in names)
        chosen = tuple(task for task in self.tasks if task.name in names)
        finetuned = {name: path for name, path in self.finetuned.items() if name in names}
        return replace(self, tasks=chosen, held_out=(*others, *self.held_out), finetuned=finetuned)


def few(images: TensorDataset, per_class: int) -> TensorDataset:
    """Return the first images of each class, in their order."""
    pixels, labels = images.tensors
    seen: dict[int, int] = {}
    places = []
    for place, label in enumerate(labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= per_class:
            places.append(place)
    return TensorDataset(pixels[places], labels[places])


@dataclass(frozen=True)
class Study:
    """Tasks to fine-tune on and merge, from which model, how; the counterpart of `Experiment` for merging.

    Attributes:
        tasks: to fine-tune on and merge.
        held_out: tasks that are only tested on.
        build_clip: makes the pretrained CLIP and its processor.
        settings: how everything trains.
        accelerator: for device and precision; one process.
        groups: names of some of the tasks, to be merged without the others, which are then held out.

    Raises:
        ValueError: a group has a task that is not among the tasks.
    """

    tasks: Sequence[Task]
    held_out: Sequence[Task]
    build_clip: Callable[[], tuple[CLIPModel, CLIPProcessor]]
    settings: StudySettings
    accelerator: Accelerator
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        for group, members in self.groups.items():
            if not members or not set(members) <= set(names):
                raise ValueError(f"the group {group!r} is {list(members)}; expected some of the tasks {names}.")

    def run(
        self,
        output_dir: Path,
        *,
        methods: Sequence[str] = METHODS,
        group_methods: Sequence[str] = (),
        robust_methods: Sequence[str] = (),
        corruptions: Sequence[str] = (),
        seed: int = 0,
    ) -> dict[str, Any]:
        """Run methods for one seed; what the output folder holds already is not done again.

        Args:
            output_dir: of this seed.
            methods: of `METHODS`.
            group_methods: those to run on each group as well.
            robust_methods: those of `methods` to run on corrupted images as well.
            corruptions: of `CORRUPTIONS`.
            seed: of the order of images, the splits and all noise.

        Returns:
            `{"seed", "rows": {method: {"accuracy": {task: %}, "held_out": {task: %}, "trainable_parameters",
            "stored_numbers", "seconds", "gates"}}, "groups": {group: {method: row}}, "robustness": {corruption: {method: {task: %}}}}`. Gates, of learned
            routers: for each task's test images those of each block, `[blocks, T]`, on average.

        Raises:
            ValueError: the folder holds a run with other settings, data or weights.
        """
        output_dir.mkdir(parents=True, exist_ok=True)
        clip, processor = self.build_clip()
        result = self._begun(output_dir / "seed.json", clip, processor, seed)
        run = self.material(clip, processor, output_dir, seed)
        for method in methods:
            if method not in result["rows"]:
                result["rows"][method] = _row(run, method, output_dir)
                write_results(output_dir / "seed.json", result)
        for group, members in self.groups.items():
            done = result.setdefault("groups", {}).setdefault(group, {})
            for method in group_methods:
                if method not in done:
                    done[method] = _row(run.only(members), method, output_dir)
                    write_results(output_dir / "seed.json", result)
        for corruption in corruptions:
            done = result["robustness"].setdefault(corruption, {})
            for method in robust_methods:
                if method not in done:
                    done[method] = _robustness(run, method, corruption, output_dir)
                    write_results(output_dir / "seed.json", result)
        return result

    def _begun(self, file: Path, clip: CLIPModel, processor: CLIPProcessor, seed: int) -> dict[str, Any]:
        """Read what an earlier run has written, or begin."""
        names = {"tasks": [task.name for task in self.tasks], "held_out": [task.name for task in self.held_out]}
        shaped_by = fingerprint((*self.tasks, *self.held_out), clip, processor, self.accelerator, self.settings)
        own = {
            **shaped_by,
            **names,
            "seed": seed,
            "groups": {name: list(members) for name, members in self.groups.items()},
        }
        if not file.exists():
            told = {"seed": seed, **names, "settings": asdict(self.settings)}
            return {**told, "rows": {}, "robustness": {}, "fingerprint": own}
        saved = json.loads(file.read_text())
        if changed := differences(saved.get("fingerprint", {}), own):
            raise ValueError(
                f"{str(file.parent)!r} holds a run with other settings: {changed}. Use those of the run, or choose "
                "another output folder (`--output_dir`)."
            )
        return saved

    def material(self, clip: CLIPModel, processor: CLIPProcessor, output_dir: Path, seed: int) -> Run:
        """Load all images, and fine-tune the models that the folder lacks."""
        clip = clip.to(self.accelerator.device).eval().requires_grad_(False)
        learnt = tuple(load_images(task, clip, processor, seed) for task in self.tasks)
        unseen = tuple(load_images(task, clip, processor, seed) for task in self.held_out)
        finetuned = {task.name: output_dir / "finetuned" / task.name for task in learnt}
        run = Run(clip, processor, learnt, unseen, finetuned, self.settings, self.accelerator, seed)
        for task in run.tasks:
            _trained(run, run.finetuned[task.name], [task], self.settings.finetune_steps)
        return run


def _trained(run: Run, folder: Path, tasks: Sequence[TaskImages], steps: int) -> CLIPModel:
    """Fine-tune, or load what an earlier run has saved; a folder appears whole or not at all."""
    if not folder.exists():
        s = run.settings
        model = finetune(
            run.clip, tasks, run.accelerator, steps=steps, lr=s.finetune_lr, batch_size=s.batch_size, seed=run.seed
        )
        with whole(folder, GO_ON) as partial:
            model.save_pretrained(partial)
    return CLIPModel.from_pretrained(folder, use_safetensors=True).to(run.accelerator.device).eval()


def merged_by(run: Run, method: str, adapt_to: dict[str, Any]) -> nn.Module:
    """Build what a method makes of the fine-tuned models, adapted to the images given if it adapts."""
    settings = run.settings
    quiet = not run.accelerator.is_main_process
    if method == "pretrained":
        return run.clip
    torch.manual_seed(run.seed)
    if method in WEMOE:
        options, loss = WEMOE[method]
        config = WEMoEConfig(**{"scaling": settings.scaling, **options})
        model = merge_finetuned(copy.deepcopy(run.clip), run.finetuned, config)
        if loss is not None:
            adapt_routers(model, adapt_to, run.how(method), heads=run.heads, progress=not quiet)
        return model
    if method in ADAMERGING:
        learning = {"batches": adapt_to, "heads": run.heads, "how": run.how(method), "progress": not quiet}
        options = {"scaling": settings.scaling, **ADAMERGING[method][0]}
        return merge_static(run.clip, run.finetuned, "adamerging", **options, **learning)
    supervised = {task.name: batches(task.finetune, settings.batch_size) for task in run.tasks}
    options = {
        "task_arithmetic": {"scaling": settings.scaling},
        "dare": {"scaling": settings.scaling, "seed": run.seed},
        "consensus": {"scaling": settings.scaling},
        "fisher": {"batches": supervised, "heads": run.heads, "seed": run.seed},
        "regmean": {"batches": supervised, "heads": run.heads},
    }
    return merge_static(run.clip, run.finetuned, method, **options.get(method, {}))


@torch.no_grad()
def mean_gates(run: Run, model: nn.Module) -> dict[str, list[list[float]]]:
    """Return, for each task's test images, the mean gates of each block, `[blocks, T]`."""
    found = {}
    for task in run.tasks:
        with recorded_gates() as gates:
            zero_shot_logits(model, task.test.tensors[0].to(run.accelerator.device), task.head_CD)
        found[task.name] = [gates_BT.mean(0).tolist() for gates_BT in gates]
    return found


def _row(run: Run, method: str, output_dir: Path) -> dict[str, Any]:
    start = time.perf_counter()
    if method == "individual":
        models = {t.name: _trained(run, run.finetuned[t.name], [t], run.settings.finetune_steps) for t in run.tasks}
        vision = sum(p.numel() for p in run.clip.vision_model.parameters())
        stored = sum(p.numel() for p in run.clip.parameters()) + vision * (len(run.tasks) - 1)
        trainable = vision * len(run.tasks)
    else:
        if method == "multitask":
            steps = run.settings.finetune_steps * len(run.tasks)
            model = _trained(run, output_dir / "finetuned" / "multitask", run.tasks, steps)
            trainable = sum(p.numel() for p in model.vision_model.parameters())
        else:
            model = merged_by(run, method, run.adaptation(method))
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            if method in ADAMERGING:
                trainable = len(run.tasks) * sum(1 for _ in run.clip.vision_model.parameters())
        models = dict.fromkeys([task.name for task in (*run.tasks, *run.held_out)], model)
        # A sparse entry's place counts as half a number: it has 32 bits, for all precisions.
        stored = sum(tensor.numel() for tensor in model.state_dict().values())
    seconds = time.perf_counter() - start
    learned = method in WEMOE and WEMOE[method][1] is not None
    return {
        "accuracy": {t.name: accuracy(models[t.name], t.test, t.head_CD) for t in run.tasks},
        "held_out": {t.name: accuracy(models[t.name], t.test, t.head_CD) for t in run.held_out if t.name in models},
        "trainable_parameters": trainable,
        "stored_numbers": stored,
        "seconds": seconds,
        **({"gates": mean_gates(run, models[run.tasks[0].name])} if learned else {}),
    }


def _robustness(run: Run, method: str, corruption: str, output_dir: Path) -> dict[str, float]:
    """Accuracy on corrupted test images, for adapting methods after adaptation to images corrupted alike."""

    def change(images: TensorDataset, offset: int = 0) -> TensorDataset:
        return corrupt(images, corruption, run.processor.image_processor, seed=run.seed + offset)

    if method == "individual":
        models = {t.name: _trained(run, run.finetuned[t.name], [t], run.settings.finetune_steps) for t in run.tasks}
    else:
        model = merged_by(run, method, run.adaptation(method, change))
        models = {task.name: model for task in run.tasks}
    # With `transductive` both calls corrupt the same images, and alike; otherwise noise is drawn anew.
    offset = 0 if run.settings.transductive else 1
    return {t.name: accuracy(models[t.name], change(t.test, offset), t.head_CD) for t in run.tasks}
