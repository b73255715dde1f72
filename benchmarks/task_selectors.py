"""How well each selector tells which task an image is from, on frozen features alone; no CLIP is trained.

    python benchmarks/task_selectors.py [--suite mini] [--model ...] [--seeds 0 1 2] [--output selectors.json]

For every seed, in a random order of tasks:

1. A fifth of each task's training images is held out. Every configuration (features, sizes, options) is fitted on the
   rest, and of each selector the one that chooses the own task of most held-out images is taken. This is done twice:
   among those that run two blocks and keep no more bytes than autoencoders of patch tokens ("small"), and among all.
2. Only then test images are looked at. The chosen ones are fitted task by task on all training images; after each task
   it is measured how well images of tasks not learnt yet are told from the others, and at the end which task is chosen.

The upper bound is scikit-learn's logistic regression on all tasks' training images at once, features and C chosen alike.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from peft_moe_merge.mtil.clip import load_clip
from peft_moe_merge.mtil.data.batches import eval_batches
from peft_moe_merge.mtil.data.mini import mini_clip_path
from peft_moe_merge.mtil.data.suites import load_suite
from peft_moe_merge.mtil.data.task import Task
from peft_moe_merge.selection import (
    NONE,
    AutoencoderSelector,
    Depths,
    DiscriminantSelector,
    FeatureSource,
    GaussianSelector,
    ImageFeatures,
    PatchTokens,
    PrototypeSelector,
    RidgeSelector,
    Selector,
    TextSelector,
    decide,
)

ALL_TOKENS = ("class", "mean", "deviation")
SHALLOW = (PatchTokens(2), Depths((2,)), Depths((2,), ALL_TOKENS))
LINEAR, QUADRATIC = {"shared": (1.0,)}, {"shared": (0.0,)}
BOTH_MEANS = [{"means": "tasks"}, {"means": "classes"}]
SIZES = [{"projection": size, "labels": labels} for size in (400, 1000, 2000) for labels in ("tasks", "classes")]

SELECTORS: dict[str, tuple[Callable[..., Selector], list[dict]]] = {
    "ridge": (RidgeSelector, SIZES),
    "ridge, none by score": (RidgeSelector, [{**size, "none_by": "score"} for size in SIZES]),
    "linear": (DiscriminantSelector, [{**means, **LINEAR} for means in BOTH_MEANS]),
    "quadratic": (DiscriminantSelector, [{**means, **QUADRATIC} for means in BOTH_MEANS]),
    "discriminant": (DiscriminantSelector, BOTH_MEANS),
    "discriminant, one threshold": (DiscriminantSelector, [{**means, "thresholds_by": "all"} for means in BOTH_MEANS]),
    "gaussian": (GaussianSelector, [{}]),
    "gaussian_classes": (GaussianSelector, [{"per_class": True}]),
    "autoencoder": (AutoencoderSelector, [{}]),
    "prototypes": (PrototypeSelector, [{}]),
    "text": (TextSelector, [{}]),
}

VARIANTS = {
    "ridge, none by score": ("ridge", "none_by", "score"),
    "discriminant, one threshold": ("discriminant", "thresholds_by", "all"),
}
"""Which selectors choose between tasks as another does, and reject otherwise: of which, and by what option."""


@dataclass
class Features:
    """Frozen features of all images of a suite, by source, task and split; labels; and the classes' text embeddings."""

    tasks: list[Task]
    of: dict[tuple[FeatureSource, str, str], torch.Tensor]
    labels: dict[tuple[str, str], torch.Tensor]
    texts: dict[str, torch.Tensor]
    logit_scale: float

    def train(self, source: FeatureSource, task: str, held_out: dict[str, torch.Tensor] | None, part: bool = False):
        """Return a task's training features and labels; with `held_out` those that are not, or (`part`) that are."""
        features, labels = self.of[source, task, "train"], self.labels[task, "train"]
        if held_out is None:
            return features, labels
        rows = held_out[task] if part else ~held_out[task]
        return features[rows], labels[rows]


@torch.no_grad()
def encode(tasks: list[Task], clip: CLIPModel, processor: CLIPProcessor, sources: list[FeatureSource]) -> Features:
    """Run the frozen CLIP over everything."""
    found = Features(tasks, {}, {}, {}, clip.logit_scale.exp().item())
    for task in tqdm(tasks, desc="features"):
        for split in ("train", "test"):
            parts: dict[FeatureSource, list[torch.Tensor]] = {source: [] for source in sources}
            labels = []
            for batch in eval_batches(getattr(task, split), processor.image_processor, batch_size=128):
                labels.append(batch["labels"])
                for source, kept in parts.items():
                    kept.append(source(clip, batch["pixel_values"]).float())
            for source, kept in parts.items():
                found.of[source, task.name, split] = torch.cat(kept)
            found.labels[task.name, split] = torch.cat(labels)
        forms = []
        for template in task.templates:
            tokens = processor.tokenizer(task.prompts(template), padding=True, truncation=True, return_tensors="pt")
            forms.append(F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=1))
        found.texts[task.name] = F.normalize(sum(forms), dim=1)
    return found


def size_of(selector: Selector) -> int:
    """Count all bytes that a selector keeps."""
    return selector.shared_bytes + sum(tensor.nbytes for own in selector.own for tensor in own.values())


def configurations(name: str, sources: list[FeatureSource]) -> list[tuple[FeatureSource, dict]]:
    """List what a selector may be made of."""
    if name == "text":
        sources = [ImageFeatures()]
    elif name == "autoencoder":  # as published but for the features; the dearest to fit
        sources = [PatchTokens(2), ImageFeatures()]
    return [(source, options) for source in sources for options in SELECTORS[name][1]]


def fit_all(name: str, source: FeatureSource, options: dict, features: Features, held_out, seed: int) -> Selector:
    """Fit a selector on all tasks."""
    selector = SELECTORS[name][0](source, seed=seed, **options)
    for task in features.tasks:
        selector.fit(task.name, [features.train(source, task.name, held_out)], features.texts[task.name])
    return selector


def own_task_rate(selector: Selector, features: Features, held_out) -> float:
    """Return the share of held-out training images for which the own task scores best, in percent, tasks alike."""
    rates = []
    for position, task in enumerate(features.tasks):
        x, _ = features.train(selector.source, task.name, held_out, part=True)
        rates.append((selector.decision_function(x).argmax(dim=1) == position).double().mean().item())
    return 100 * float(np.mean(rates))


def choose(features: Features, sources: list[FeatureSource], names: list[str], seed: int, held_out):
    """Choose each selector's configuration on held-out training images: {(group, selector): (rate, source, options)}."""
    budget = size_of(fit_all("autoencoder", PatchTokens(2), {"iterations": 1}, features, held_out, seed))
    best: dict[tuple[str, str], tuple[float, FeatureSource, dict]] = {}
    for name in names:
        for source, options in tqdm(configurations(name, sources), desc=name, leave=False):
            if name in VARIANTS:
                continue  # the choice among tasks is that of the same without; taken over below
            selector = fit_all(name, source, options, features, held_out, seed)
            rate = own_task_rate(selector, features, held_out)
            groups = ["any"] + (["small"] if source in SHALLOW and size_of(selector) <= budget else [])
            for group in groups:
                if (group, name) not in best or rate > best[group, name][0]:
                    best[group, name] = rate, source, options
    for group in ("small", "any"):
        for name, (of, option, value) in VARIANTS.items():
            if name in names and (group, of) in best:
                rate, source, options = best[group, of]
                best[group, name] = rate, source, {**options, option: value}
    return best


@torch.no_grad()
def test(name: str, source: FeatureSource, options: dict, features: Features, seed: int) -> dict[str, float]:
    """Fit task by task on all training images, and measure on the test images of all tasks."""
    selector = SELECTORS[name][0](source, seed=seed, **options)
    x = torch.cat([features.of[source, task.name, "test"] for task in features.tasks])
    images = torch.cat([features.of[ImageFeatures(), task.name, "test"] for task in features.tasks])
    owner = torch.cat([torch.full((len(features.labels[t.name, "test"]),), i) for i, t in enumerate(features.tasks)])
    weight = 1.0 / torch.bincount(owner).double()[owner]  # tasks count alike
    told: dict[str, list[float]] = {name: [] for name in ("auroc", "energy", "agreement", "unseen rejected")}
    for position, task in enumerate(features.tasks):
        selector.fit(task.name, [features.train(source, task.name, None)], features.texts[task.name])
        if position + 1 == len(features.tasks):
            break
        scores, bars = selector.judge(x)
        chosen, margins = decide(scores, bars)
        unseen = owner > position
        zero_shot = features.logit_scale * F.normalize(images, dim=1)
        by_task = [zero_shot @ features.texts[known.name].T for known in features.tasks[: position + 1]]
        believed = torch.stack([part.logsumexp(dim=1) for part in by_task], dim=1).softmax(dim=1)
        agreement = believed.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]
        known = (scores - bars) + selector.thresholds().float()  # what thresholds are for
        for kind, value in (("auroc", margins), ("energy", known.logsumexp(dim=1)), ("agreement", agreement)):
            told[kind].append(roc_auc_score(unseen, -value.double(), sample_weight=weight))
        rejected = (chosen == NONE).double()
        told["unseen rejected"].append(100 * ((rejected * weight)[unseen].sum() / weight[unseen].sum()).item())
    scores, bars = selector.judge(x)
    chosen, _ = decide(scores, bars)
    began = time.process_time()
    for part in x.split(64):
        selector.select(part)
    seconds = time.process_time() - began

    def share(of: torch.Tensor) -> float:
        return 100 * ((of * weight).sum() / weight.sum()).item()

    return {
        "own task": share(scores.argmax(dim=1) == owner),
        "own task, not rejected": share(chosen == owner),
        "own rejected": share(chosen == NONE),
        **{name: float(np.mean(values)) for name, values in told.items()},
        "bytes": size_of(selector),
        "microseconds": 1e6 * seconds / len(x),
    }


def upper_bound(features: Features, sources: list[FeatureSource], held_out) -> dict[str, object]:
    """Fit logistic regression on all tasks at once; features and C by held-out training images; then test."""

    def data(source: FeatureSource, out, part: bool = False) -> tuple[np.ndarray, np.ndarray]:
        parts = [features.train(source, task.name, out, part)[0] for task in features.tasks]
        return torch.cat(parts).numpy(), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

    def probe(c: float) -> Pipeline:
        return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500, class_weight="balanced"))

    best = None
    for source in tqdm(sources, desc="linear probe", leave=False):
        for c in (1e-3, 1e-2, 1e-1):
            x, owner = data(source, held_out, True)
            predicted = probe(c).fit(*data(source, held_out)).predict(x)
            rate = np.mean([(predicted[owner == task] == task).mean() for task in np.unique(owner)])
            if best is None or rate > best[0]:
                best = rate, source, c
    rate, source, c = best
    fitted = probe(c).fit(*data(source, None))
    tests = [features.of[source, task.name, "test"].numpy() for task in features.tasks]
    right = [(fitted.predict(x) == position).mean() for position, x in enumerate(tests)]
    return {"held out": 100 * rate, "own task": 100 * float(np.mean(right)), "source": str(source), "C": c}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="mini", help="as examples/mtil.py has it, or a folder of tasks")
    parser.add_argument("--model", help="CLIP by folder or Hub id; default: the embedded one")
    parser.add_argument("--tasks", nargs="*", help="some tasks of the suite")
    parser.add_argument("--selectors", nargs="*", default=list(SELECTORS), choices=list(SELECTORS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, after every seed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    tasks = load_suite(arguments.suite, arguments.tasks)
    clip, processor = load_clip(arguments.model or mini_clip_path())
    clip.eval()
    blocks = clip.config.vision_config.num_hidden_layers
    deep = (Depths((2, blocks)), Depths((blocks,), ALL_TOKENS), ImageFeatures())
    sources = [*SHALLOW, *deep]
    features = encode(tasks, clip, processor, sources)
    results: list[dict] = []
    for seed in arguments.seeds:
        draw = np.random.default_rng(seed)
        features.tasks = [tasks[position] for position in draw.permutation(len(tasks))]
        held_out = {
            task.name: torch.from_numpy(draw.random(len(features.labels[task.name, "train"])) < 0.2) for task in tasks
        }
        of_seed: dict = {"seed": seed, "selectors": {"small": {}, "any": {}}, "bound": {}}
        chosen = choose(features, sources, arguments.selectors, seed, held_out)
        for (group, name), (rate, source, options) in tqdm(chosen.items(), desc=f"testing, seed {seed}"):
            measured = test(name, source, options, features, seed)
            configuration = {"source": str(source), **options}
            of_seed["selectors"][group][name] = {"held out": rate, **measured, "configuration": configuration}
        for group, of_group in (("small", list(SHALLOW)), ("any", sources)):
            of_seed["bound"][group] = upper_bound(features, of_group, held_out)
        results.append(of_seed)
        if arguments.output:
            arguments.output.write_text(json.dumps(results, indent=1))
    show(results)


def show(results: list[dict]) -> None:
    """Print means and standard deviations over seeds."""
    columns = ("held out", "own task", "own task, not rejected", "own rejected", "unseen rejected", "auroc", "energy")
    columns += ("agreement", "bytes", "microseconds")
    for group in ("small", "any"):
        table = Table(title=f"{group}: mean over {len(results)} seeds, and standard deviation")
        for heading in ("", *columns):
            table.add_column(heading, overflow="fold")
        for name in SELECTORS:
            rows = [of_seed["selectors"][group][name] for of_seed in results if name in of_seed["selectors"][group]]
            if rows:
                values = {column: [row[column] for row in rows] for column in columns}
                cells = []
                for column, of_column in values.items():
                    digits = {"auroc": 3, "energy": 3, "agreement": 3, "bytes": 0, "microseconds": 0}.get(column, 1)
                    cells.append(f"{np.mean(of_column):,.{digits}f} ± {np.std(of_column):,.{digits}f}")
                table.add_row(name, *cells)
                for row in rows:
                    print(group, name, row["configuration"])
        bound = [of_seed["bound"][group] for of_seed in results]
        cells = [
            f"{np.mean([row[c] for row in bound]):.1f} ± {np.std([row[c] for row in bound]):.1f}" for c in columns[:2]
        ]
        table.add_row("linear probe, all tasks at once", *cells)
        Console(width=200).print(table)


if __name__ == "__main__":
    main()
