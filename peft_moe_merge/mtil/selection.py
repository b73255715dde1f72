"""What a stream's numbers are when nobody says which task an image is from: selectors, fitted and tested as it goes.

Shapes: B images, F features, T tasks, V variants (selectors x decisions), C classes of a data set, P projection width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.selection import (
    NONE,
    SELECTORS,
    AlexNetFeatures,
    Candidates,
    Depths,
    FeatureSource,
    ImageFeatures,
    PatchTokens,
    Selector,
    TextSelector,
    decide,
    load_selector,
    save_selector,
    tasks_of_candidates,
)
from peft_moe_merge.selection.features import TOKENS

from .data.batches import Batch, eval_batches
from .data.task import Task
from .methods.base import Method, Routed
from .settings import check_at_least, check_choices, setting

CLASSES = {"means": "classes"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian_classes": ("gaussian", {"per_class": True}),
    "discriminant_classes": ("discriminant", CLASSES),
    "lda": ("discriminant", {**CLASSES, "shared": (1.0,)}),
    "qda": ("discriminant", {**CLASSES, "shared": (0.0,)}),
}
"""Selectors with other options than their defaults: by a name of their own, the kind and the options."""
DECISIONS = ("per_image", "per_batch", "candidates")
"""`candidates` is per image too, but told which classes are asked about: those of the image's data set."""


@dataclass
class SelectorSettings:
    """Which selectors a stream tries, with methods that have routers."""

    selectors: list[str] = setting([], "how to tell which task an image is from", choices=[*SELECTORS, *VARIANTS])
    selector_features: Literal["patch_tokens", "depths", "image_features", "alexnet"] = setting(
        "patch_tokens", "what they look at"
    )
    selector_depth: int = setting(2, "patch_tokens, depths: blocks of the frozen vision tower that run for them")
    selector_batch: int = setting(64, "images, all of one data set, that are decided together 'per batch'")
    reject_rate: float = setting(0.05, "share of a task's own images that may be taken for none of the tasks")
    alexnet_weights: str | None = setting(None, "alexnet: safetensors of torchvision's AlexNet; default: random")

    def __post_init__(self):
        check_choices(self, "selectors", [*SELECTORS, *VARIANTS])
        if self.selector_features not in ("patch_tokens", "depths", "image_features", "alexnet"):
            raise ValueError(
                f"`selector_features` must be patch_tokens, depths, image_features or alexnet, got {self.selector_features!r}."
            )
        check_at_least(self, 1, "selector_batch")
        self.build()  # so that values out of range are refused before anything runs

    def source(self) -> FeatureSource:
        """Return where features come from."""
        if self.selector_features == "patch_tokens":
            return PatchTokens(self.selector_depth)
        if self.selector_features == "depths":
            return Depths((self.selector_depth,), tuple(TOKENS))
        return ImageFeatures() if self.selector_features == "image_features" else AlexNetFeatures(self.alexnet_weights)

    def build(self) -> dict[str, Selector]:
        """Make the selectors, by name."""
        source, selectors = self.source(), {}
        for name in self.selectors:
            kind, options = VARIANTS.get(name, (name, {}))
            own_source = ImageFeatures() if kind == TextSelector.kind else source  # what texts can be compared with
            selectors[name] = SELECTORS[kind](own_source, reject_rate=self.reject_rate, **options)
        return selectors

    @torch.no_grad()
    def check(self, clip: CLIPModel, processor: CLIPProcessor, task: Task) -> None:
        """Look at one image by all selectors' sources, so that what they lack is found before anything trains.

        Raises:
            ValueError, OSError, ImportError: the model is not as deep as `selector_depth`, there is no such file of
                weights, or a package is missing.
        """
        if self.selectors:
            (batch,) = eval_batches(task.test.select([0]), processor.image_processor, batch_size=1)
            for selector in self.build().values():
                selector.source(clip, batch["pixel_values"])


class StreamSelectors:
    """The selectors of one run: fitted on each task when it has been learnt, then tested on the data of all tasks.

    Attributes:
        selectors: by name.
    """

    def __init__(self, settings: SelectorSettings):
        self.settings = settings
        self.selectors = settings.build()

    def save(self, folder: Path) -> None:
        """Write all selectors, each into a folder of its name."""
        for name, selector in self.selectors.items():
            save_selector(selector, folder / name)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.selectors = {name: load_selector(folder / name) for name in self.selectors}

    @property
    def sources(self) -> list[FeatureSource]:
        """What the selectors look at, each source once."""
        return list(dict.fromkeys(selector.source for selector in self.selectors.values()))

    @torch.no_grad()
    def fit(self, method: Routed, task: Task, settings: Any, accelerator: Accelerator) -> None:
        """Fit all selectors on a task that was just learnt. With several processes all fit on the images of all."""
        method.model.to(accelerator.device).eval()
        batches = accelerator.prepare(settings.eval_batches(task.train, method.processor.image_processor))
        collected: dict[FeatureSource, list[tuple[Tensor, Tensor]]] = {source: [] for source in self.sources}
        for batch in self._bar(batches, f"features of {task.name}", accelerator):
            for source, kept in collected.items():
                features_BF = method.frozen_features(source, batch["pixel_values"]).float()
                gathered = accelerator.gather_for_metrics((features_BF, batch["labels"]))
                kept.append(tuple(tensor.cpu() for tensor in gathered))
        texts_CP = _class_features(method, task, NONE, accelerator).cpu() if "text" in self.selectors else None
        for selector in self.selectors.values():
            selector.fit(task.name, collected[selector.source], texts_CP)

    @torch.no_grad()
    def evaluate(
        self, method: Routed, tasks: list[Task], settings: Any, accelerator: Accelerator
    ) -> dict[str, dict[str, dict[str, Any]]]:
        """Test on the test images of all tasks, learnt or not, without being told which task they are from.

        An image is encoded once per router that any selector chooses for it. Per batch, `selector_batch` neighbours
        of one data set are decided together, or what is left of them at the end of a batch of the data loader.

        Args:
            method: after training.
            tasks: the stream.
            settings: the stream's, for batch size and workers.
            accelerator: device, precision, processes.

        Returns:
            Per selector and decision: `accuracies` in percent per data set, `confusion` (data sets x (tasks + none),
            counts) and `auroc` of telling images of tasks not learnt yet from the others, None if there are none.
        """
        method.model.to(accelerator.device).eval()
        learnt = len(method.learnt)
        variants = [(name, decision) for name in self.selectors for decision in DECISIONS]
        accuracies: list[list[float]] = []
        confusion_JVN = torch.zeros(len(tasks), len(variants), len(tasks) + 1, dtype=torch.int64)
        margins, unknown = [], []
        for position, task in enumerate(tasks):
            batches = accelerator.prepare(settings.eval_batches(task.test, method.processor.image_processor))
            classes: dict[int, Tensor] = {}
            hits = torch.zeros(len(variants))
            total = 0
            evidence = tasks_of_candidates(task.class_names, [known.class_names for known in tasks[:learnt]])
            for batch in self._bar(batches, f"selecting on {task.name}", accelerator):
                chosen_BV, margins_BV = self._choose(method, batch["pixel_values"], evidence)
                right_BV = self._right(method, task, batch, chosen_BV, classes, accelerator)
                chosen_BV, margins_BV, right_BV = accelerator.gather_for_metrics((chosen_BV, margins_BV, right_BV))
                hits += right_BV.sum(dim=0).cpu()
                total += len(right_BV)
                columns_BV = chosen_BV.where(chosen_BV != NONE, len(tasks)).cpu()
                confusion_JVN[position] += F.one_hot(columns_BV, len(tasks) + 1).sum(dim=0)
                margins.append(margins_BV.cpu())
                unknown += [position >= learnt] * len(margins_BV)
            accuracies.append([100.0 * hit / total for hit in hits.tolist()])
        margins_MV = torch.cat(margins)
        told: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.selectors}
        for variant, (name, decision) in enumerate(variants):
            told[name][decision] = {
                "accuracies": [row[variant] for row in accuracies],
                "confusion": confusion_JVN[:, variant].tolist(),
                "auroc": (
                    float(roc_auc_score(unknown, -margins_MV[:, variant]))
                    if any(unknown) and decision != "candidates"  # these are evidence, not margins
                    else None
                ),
            }
        return told

    def _choose(self, method: Routed, pixel_values: Tensor, evidence: Candidates) -> tuple[Tensor, Tensor]:
        """Choose for each image by every variant: task ids and margins, both B x V."""
        features = {source: method.frozen_features(source, pixel_values).float() for source in self.sources}
        chosen, margins = [], []
        for selector in self.selectors.values():
            features_BF = features[selector.source]
            scores_BT, bars_BT = selector.judge(features_BF)
            groups = [selector.judge(part, len(part)) for part in features_BF.split(self.settings.selector_batch)]
            together = [decide(*group, per_batch=True) for group in groups]
            asked = torch.full((len(scores_BT),), NONE, device=scores_BT.device), scores_BT.new_zeros(len(scores_BT))
            if evidence.allowed:
                needed_BT = torch.full_like(bars_BT, -torch.inf) if evidence.complete else bars_BT
                asked = decide(scores_BT, needed_BT, allowed=evidence.allowed)[0], asked[1]
            for chosen_B, margins_B in (
                decide(scores_BT, bars_BT),
                map(torch.cat, zip(*together, strict=True)),
                asked,
            ):
                chosen.append(chosen_B)
                margins.append(margins_B)
        return torch.stack(chosen, dim=1), torch.stack(margins, dim=1)

    def _right(
        self,
        method: Routed,
        task: Task,
        batch: Batch,
        chosen_BV: Tensor,
        classes: dict[int, Tensor],
        accelerator: Accelerator,
    ) -> Tensor:
        """Tell whether the class is right under the router that each variant chose: B x V."""
        right_BV = torch.zeros_like(chosen_BV, dtype=torch.bool)
        for router in chosen_BV.unique().tolist():
            if router not in classes:
                classes[router] = _class_features(method, task, router, accelerator)
            rows = (chosen_BV == router).any(dim=1).nonzero().flatten()
            with accelerator.autocast():
                features_BP = method.routed_image_features(batch["pixel_values"][rows], torch.full_like(rows, router))
                hits_B = (features_BP @ classes[router].T).argmax(dim=1) == batch["labels"][rows]
            right_BV[rows] |= hits_B[:, None] & (chosen_BV[rows] == router)
        return right_BV

    @staticmethod
    def _bar(batches: Any, what: str, accelerator: Accelerator) -> Any:
        return tqdm(batches, desc=what, disable=not accelerator.is_main_process, leave=False)


def _class_features(method: Method, task: Task, router: int, accelerator: Accelerator) -> Tensor:
    """Encode a data set's classes by a router, or by the model without experts: C x P."""
    method.set_task(None if router == NONE else method.learnt[router])
    with accelerator.autocast():
        return method.class_features(task, accelerator.device)
