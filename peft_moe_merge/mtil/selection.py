"""What a stream's numbers are when nobody says which task an image is from: selectors, fitted and tested as it goes.

Shapes: B images, F features, T tasks, V variants (selectors x decisions), R routes (the learnt tasks, then none), C classes
told apart, P projection width.
"""

from __future__ import annotations

import copy
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

from peft_moe_merge.inference.zero_shot import cosines
from peft_moe_merge.selection import (
    NONE,
    SELECTORS,
    AlexNetFeatures,
    Candidates,
    Depths,
    DiscriminantSelector,
    FeatureSource,
    ImageFeatures,
    IncrementalSelector,
    PatchTokens,
    Selector,
    TextSelector,
    decide,
    fuse,
    load_selector,
    mixture,
    save_selector,
    tasks_of_candidates,
)
from peft_moe_merge.selection.features import TOKENS

from .data.batches import Batch, eval_batches
from .data.features import labelled_features
from .data.label_space import LabelSpace
from .data.task import Task
from .methods.base import Routed
from .settings import check_at_least, check_choices, setting

CLASSES = {"means": "classes"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gaussian_classes": ("gaussian", {"per_class": True}),
    "discriminant_classes": ("discriminant", CLASSES),
    "lda": ("discriminant", {**CLASSES, "shared": (1.0,)}),
    "qda": ("discriminant", {**CLASSES, "shared": (0.0,)}),
}
"""Selectors with other options than their defaults: by a name of their own, the kind and the options."""
DECISIONS = ("per_image", "per_batch", "candidates", "soft")
"""`candidates` is per image too, but told which classes are asked about: those of the image's data set. `soft` mixes the
class probabilities of the likeliest tasks, with selectors that have a posterior."""
X_TAIL_DECISIONS = ("per_image", "soft", "per_image_own", "soft_own", "soft_fused")
"""Under X-TAIL all classes are candidates: any learnt task may be chosen, and none only while some classes are of none. A
chosen task tells all classes apart, or by `_own` those of its own alone; plain CLIP always all. `soft_fused` is `soft_own` where
selectors that know classes have their say in these, too, see `fuse`."""


@dataclass(frozen=True)
class Variant:
    """A selector, how it decides, and the protocol that its choice is scored by."""

    selector: str
    decision: str
    protocol: str = "mtil"

    @property
    def soft(self) -> bool:
        """Whether several routes share an image."""
        return self.decision.startswith("soft")

    @property
    def among(self) -> str:
        """Which classes a route tells apart: the image's "data set"'s, "all" or the route's "own"."""
        if self.protocol == "mtil":
            return "data set"
        return "own" if self.decision.endswith("_own") or self.fused else "all"

    @property
    def fused(self) -> bool:
        """Whether the selector has a say in a task's classes."""
        return self.decision.endswith("_fused")


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
        self._texts: EncodedClasses = {}  # by routes that stay as they are

    def save(self, folder: Path, in_parts: bool = False) -> None:
        """Write all selectors, each into a folder of its name, see `save_selector`."""
        for name, selector in self.selectors.items():
            save_selector(selector, folder / name, in_parts=in_parts)

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
        collected: dict[FeatureSource, list[tuple[Tensor, Tensor]]] = {source: [] for source in self.sources}

        def see(pixel_values: Tensor) -> list[Tensor]:
            pixels = pixel_values.to(accelerator.device)
            return [method.frozen_features(source, pixels).float().cpu() for source in collected]

        how = settings.eval_batch_size, settings.num_workers
        for seen, labels_B in labelled_features(task, method.processor.image_processor, see, *how):
            for kept, features_BF in zip(collected.values(), seen, strict=True):
                kept.append((features_BF, labels_B))
        texts_CP = None
        if "text" in self.selectors:
            texts_CP = RouteTexts(method, LabelSpace.of_task(task), accelerator, {})[NONE].cpu()
        for selector in self.selectors.values():
            selector.fit(task.name, collected[selector.source], texts_CP)

    def variants(self, x_tail: bool = False) -> list[Variant]:
        """List what is tried: every selector with every decision that it can make."""
        by_protocol = {"mtil": DECISIONS, **({"x_tail": X_TAIL_DECISIONS} if x_tail else {})}
        return [
            Variant(name, decision, protocol)
            for protocol, decisions in by_protocol.items()
            for name, selector in self.selectors.items()
            for decision in decisions
            if _can_decide(selector, decision)
        ]

    @torch.no_grad()
    def evaluate(
        self,
        method: Routed,
        tasks: list[Task],
        settings: Any,
        accelerator: Accelerator,
        all_classes: LabelSpace | None = None,
    ) -> tuple[dict[str, dict[str, dict[str, Any]]], list[list[Any]]]:
        """Test on the test images of all tasks, learnt or not, without being told which task they are from.

        An image is encoded once per route that any selector chooses for it. Per batch, `selector_batch` neighbours
        of one data set are decided together, or what is left of them at the end of a batch of the data loader.

        Args:
            method: after training.
            tasks: the stream.
            settings: the stream's, for batch size and workers.
            accelerator: device, precision, processes.
            all_classes: for X-TAIL: images are told apart among these, too.

        Returns:
            MTIL's: per selector and decision `accuracies` in percent per data set, `confusion` (data sets x (tasks + none),
            counts of the likeliest) and `auroc` of telling images of tasks not learnt yet from the others, None where there
            are none or nothing is compared with a threshold. X-TAIL's: selector, decision and accuracies of each.
        """
        method.model.to(accelerator.device).eval()
        learnt = len(method.learnt)
        variants = self.variants(all_classes is not None)
        accuracies: list[list[float]] = []
        confusion_JVN = torch.zeros(len(tasks), len(variants), len(tasks) + 1, dtype=torch.int64)
        margins, unknown = [], []
        known_classes = [known.class_names for known in tasks[:learnt]]
        encoded = self._texts if method.routes_stay else {}
        asked, among = {}, {}
        if all_classes is not None:
            asked["x_tail"] = tasks_of_candidates(all_classes.names, known_classes)
            among["all"] = RouteTexts(method, all_classes, accelerator, encoded)
            among["own"] = among["all"].of_own_classes()
        for position, task in enumerate(tasks):
            batches = accelerator.prepare(settings.eval_batches(task.test, method.processor.image_processor))
            asked["mtil"] = tasks_of_candidates(task.class_names, known_classes)
            among["data set"] = RouteTexts(method, LabelSpace.of_task(task), accelerator, encoded)
            hits = torch.zeros(len(variants))
            total = 0
            for batch in self._bar(batches, f"selecting on {task.name}", accelerator):
                pixels = batch["pixel_values"]
                features = {source: method.frozen_features(source, pixels).float() for source in self.sources}
                shares_BVR, margins_BV = self._choose(features, learnt, variants, asked)
                right_BV = self._right(task, batch, variants, shares_BVR, features, among)
                chosen_BV = shares_BVR.argmax(dim=2)
                chosen_BV, margins_BV, right_BV = accelerator.gather_for_metrics((chosen_BV, margins_BV, right_BV))
                hits += right_BV.sum(dim=0).cpu()
                total += len(right_BV)
                columns_BV = chosen_BV.where(chosen_BV != learnt, len(tasks)).cpu()
                confusion_JVN[position] += F.one_hot(columns_BV, len(tasks) + 1).sum(dim=0)
                margins.append(margins_BV.cpu())
                unknown += [position >= learnt] * len(margins_BV)
            accuracies.append([100.0 * hit / total for hit in hits.tolist()])
        margins_MV = torch.cat(margins).nan_to_num()  # infinite where a task has no threshold
        told: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in self.selectors}
        x_tail: list[list[Any]] = []
        for column, variant in enumerate(variants):
            of_variant = [row[column] for row in accuracies]
            if variant.protocol == "x_tail":
                x_tail.append([variant.selector, variant.decision, of_variant])
                continue
            compared = any(unknown) and variant.decision in ("per_image", "per_batch")
            told[variant.selector][variant.decision] = {
                "accuracies": of_variant,
                "confusion": confusion_JVN[:, column].tolist(),
                "auroc": float(roc_auc_score(unknown, -margins_MV[:, column])) if compared else None,
            }
        return told, x_tail

    def _choose(
        self, features: dict[FeatureSource, Tensor], learnt: int, variants: list[Variant], asked: dict[str, Candidates]
    ) -> tuple[Tensor, Tensor]:
        """Choose for each image by every variant: the share of each route, B x V x R, and margins, B x V."""
        routes = learnt + 1
        judged = {name: selector.judge(features[selector.source]) for name, selector in self.selectors.items()}
        shares, margins = [], []
        for variant in variants:
            selector, evidence = self.selectors[variant.selector], asked[variant.protocol]
            features_BF, (scores_BT, bars_BT) = features[selector.source], judged[variant.selector]
            if variant.decision == "per_batch":
                groups = [selector.judge(part, len(part)) for part in features_BF.split(self.settings.selector_batch)]
                together = [decide(*group, per_batch=True) for group in groups]
                chosen_B, margins_B = map(torch.cat, zip(*together, strict=True))
            elif variant.decision == "candidates" or variant.protocol == "x_tail":
                chosen_B, margins_B = _decide_among(scores_BT, bars_BT, evidence)
            else:
                chosen_B, margins_B = decide(scores_BT, bars_BT)
            if variant.soft:
                may_be_none = variant.protocol == "mtil" or not evidence.complete
                shares_BR = mixture(selector.posterior(features_BF, may_be_none=may_be_none))
            else:
                shares_BR = F.one_hot(chosen_B.where(chosen_B != NONE, routes - 1), routes).float()
            shares.append(shares_BR)
            margins.append(margins_B)
        return torch.stack(shares, dim=1), torch.stack(margins, dim=1)

    def _right(
        self,
        task: Task,
        batch: Batch,
        variants: list[Variant],
        shares_BVR: Tensor,
        features: dict[FeatureSource, Tensor],
        among: dict[str, RouteTexts],
    ) -> Tensor:
        """Tell whether the class is right that is likeliest under the routes that each variant chose: B x V."""
        method, accelerator = among["data set"].method, among["data set"].accelerator
        device, labels_B = batch["labels"].device, batch["labels"].cpu()
        scale, shares_BVR = method.model.logit_scale.exp().item(), shares_BVR.cpu().double()
        none = shares_BVR.shape[2] - 1
        right_BV = torch.zeros(shares_BVR.shape[:2], dtype=torch.bool)
        columns: dict[tuple[str, str | None], list[int]] = {}  # of variants that find a route's classes equally likely
        for column, variant in enumerate(variants):
            columns.setdefault((variant.among, variant.selector if variant.fused else None), []).append(column)
        mixed = dict.fromkeys(columns, 0.0)
        for route in (shares_BVR > 0).any(dim=1).any(dim=0).nonzero().flatten().tolist():
            rows = (shares_BVR[:, :, route] > 0).any(dim=1).nonzero().flatten()
            router = NONE if route == none else route
            classes = {of: texts[router] for of, texts in among.items()}
            pixels = batch["pixel_values"][rows.to(device)]
            with accelerator.autocast():
                features_BP = method.routed_image_features(pixels, torch.full((len(rows),), router, device=device))
            cosines_of = {of: cosines(features_BP, classes_CP).cpu() for of, classes_CP in classes.items()}
            for (of, fused), alike in columns.items():
                # in float64 equal only where the cosines are: where one route has it all, they decide
                logits_BC = among[of].narrowed(scale * cosines_of[of].double(), router)
                if fused is None or router == NONE:
                    likely_BC = logits_BC.softmax(dim=1)
                else:
                    selector = self.selectors[fused]
                    known, posterior_BK = selector.class_posterior(features[selector.source][rows.to(device)], router)
                    own_C = among[of].space.columns[method.learnt[router]]
                    likely_BC = fuse(logits_BC, own_C[known.cpu()], posterior_BK.cpu()).exp()
                shares_BV = shares_BVR[rows][:, alike, route]
                of_route = likely_BC.new_zeros(len(labels_B), shares_BV.shape[1], likely_BC.shape[1])
                by_share = shares_BV[:, :, None] * likely_BC[:, None]
                mixed[of, fused] = mixed[of, fused] + of_route.index_copy(0, rows, by_share)
        for (of, fused), mixed_BVC in mixed.items():
            true_B = among[of].space.columns[task.name][labels_B]
            right_BV[:, columns[of, fused]] = mixed_BVC.argmax(dim=2) == true_B[:, None]
        return right_BV.to(device)

    @staticmethod
    def _bar(batches: Any, what: str, accelerator: Accelerator) -> Any:
        return tqdm(batches, desc=what, disable=not accelerator.is_main_process, leave=False)


def _can_decide(selector: Selector, decision: str) -> bool:
    if decision.endswith("_fused"):
        return isinstance(selector, DiscriminantSelector) and selector.needs_labels
    return not decision.startswith("soft") or isinstance(selector, IncrementalSelector)


def _decide_among(scores_BT: Tensor, bars_BT: Tensor, evidence: Candidates) -> tuple[Tensor, Tensor]:
    if not evidence.allowed:
        return torch.full_like(scores_BT[:, 0], NONE, dtype=torch.int64), torch.zeros_like(scores_BT[:, 0])
    bars_BT = torch.full_like(bars_BT, -torch.inf) if evidence.complete else bars_BT
    return decide(scores_BT, bars_BT, allowed=evidence.allowed)


EncodedClasses = dict[int, dict[tuple[str, ...], Tensor]]
"""By route, the features of classes, P each, by their prompts."""


class RouteTexts:
    """The classes of a label space as each route encodes them, C x P; each is encoded when it is first asked for.

    Args:
        method: whose routes.
        space: the classes.
        accelerator: device and precision.
        encoded: those that routes have encoded, for other spaces, too; it grows.
    """

    def __init__(self, method: Routed, space: LabelSpace, accelerator: Accelerator, encoded: EncodedClasses):
        self.method, self.space, self.accelerator = method, space, accelerator
        self.own_classes = False
        self.encoded = encoded

    def of_own_classes(self) -> RouteTexts:
        """Return the same where a route tells its task's own classes apart and no others."""
        narrow = copy.copy(self)
        narrow.own_classes = True
        return narrow

    def __getitem__(self, router: int) -> Tensor:
        by_prompts = self.encoded.setdefault(router, {})
        if missing := [prompts for prompts in self.space.prompts if prompts not in by_prompts]:
            self.method.set_task(None if router == NONE else self.method.learnt[router])
            with self.accelerator.autocast():
                classes_CP = self.method.encode_classes(missing, self.accelerator.device)
            by_prompts |= zip(missing, classes_CP, strict=True)
        return torch.stack([by_prompts[prompts] for prompts in self.space.prompts])

    def narrowed(self, logits_BC: Tensor, router: int) -> Tensor:
        """Rule out the classes that a route does not tell apart."""
        if not self.own_classes or router == NONE:
            return logits_BC
        own_C = torch.zeros(logits_BC.shape[1], dtype=torch.bool)
        own_C[self.space.columns[self.method.learnt[router]]] = True
        return logits_BC.masked_fill(~own_C, -torch.inf)
