"""What a stream comes to when nobody tells the task: streams with fresh seeds, each with an order of its own.

    python benchmarks/unknown_task.py --seeds 100 101 102 --output_dir runs/unknown
    python benchmarks/unknown_task.py --suite <folder> --model <folder> --depth 6 --output_dir runs/photos [-- --batch_size 64]

Every seed is a run of `examples/mtil.py` with `--protocol x_tail` in a folder of its own, with the tasks in the order that
the seed draws, so an interrupted study goes on where it was. Arguments after `--` go to the example. `--only_show` prints
what is there.

As an upper bound a selector of its own kind is tried beside: scikit-learn's logistic regression from the same frozen features
to the tasks, fitted on the training images of all tasks at once, those to come included, its C chosen on a held-out fifth of
them. It chooses none where a task that is not learnt yet is likeliest.
"""

import argparse
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from peft_moe_merge.selection import SELECTORS, Selector

EXAMPLE = Path(__file__).parents[1] / "examples" / "mtil.py"
METHODS = ("zero_shot", "lora_per_task", "moe_lora_pool", "icarl")
PROBE = "linear_probe"


class ProbeSelector(Selector):
    """The upper bound: a linear probe that has seen the images of all tasks, those to come too."""

    kind = PROBE
    own_names = ()
    fitted: ClassVar[dict[str, Tensor]]
    """Of each task a row of weights and, last, the bias: DoubleTensor[F + 1]."""

    def fit(self, task, features, texts_CP=None) -> None:
        self._check_new(task)
        self.tasks, self.width = [*self.tasks, task], len(self.fitted[task]) - 1
        self.own = [*self.own, {"threshold": torch.full((3,), -torch.inf, dtype=torch.float64)}]

    def _logits(self, features_BF: Tensor, tasks: list[str]) -> Tensor:
        weights_TG = torch.stack([self.fitted[task] for task in tasks]).to(features_BF.device)
        return (features_BF.double() @ weights_TG[:, :-1].T + weights_TG[:, -1]).float()

    def decision_function(self, features_BF: Tensor) -> Tensor:
        return self._logits(features_BF, self.tasks)

    def bars(self, features_BF: Tensor, scores_BT: Tensor, together: int = 1) -> Tensor:
        to_come = [task for task in self.fitted if task not in self.tasks]
        if not to_come:
            return torch.full_like(scores_BT, -torch.inf)
        return self._logits(features_BF, to_come).amax(dim=1, keepdim=True).expand_as(scores_BT)


SELECTORS[PROBE] = ProbeSelector  # before the example asks which there are

from peft_moe_merge.mtil.clip import load_clip  # noqa: E402
from peft_moe_merge.mtil.data.batches import eval_batches  # noqa: E402
from peft_moe_merge.mtil.data.mini import mini_clip_path  # noqa: E402
from peft_moe_merge.mtil.data.suites import load_suite  # noqa: E402
from peft_moe_merge.mtil.report.tables import (  # noqa: E402
    SELECTION_CAPTION,
    X_TAIL_CAPTION,
    selection_rows,
    summary_rows,
    x_tail_rows,
)
from peft_moe_merge.mtil.results import read_results  # noqa: E402
from peft_moe_merge.mtil.selection import SelectorSettings  # noqa: E402
from peft_moe_merge.report.statistics import estimate, paired_differences  # noqa: E402
from peft_moe_merge.report.tables import difference, print_table  # noqa: E402


def selector_arguments(options: argparse.Namespace) -> list[str]:
    return ["--selector_features", "depths", "--selector_depth", str(options.depth)]


@torch.no_grad()
def fit_probe(options: argparse.Namespace) -> dict[str, Tensor]:
    """Fit the linear probe, or read it if an earlier call did."""
    path = Path(options.output_dir, "probe.safetensors")
    if path.exists():
        return load_file(path)
    clip, processor = load_clip(options.model or mini_clip_path())
    source = SelectorSettings(selector_features="depths", selector_depth=options.depth).source()
    tasks, features = load_suite(options.suite, None), []
    for task in tasks:
        batches = eval_batches(task.train, processor.image_processor, batch_size=128)
        features.append(torch.cat([source(clip.eval(), batch["pixel_values"]).float() for batch in batches]))
    x, owner = torch.cat(features).numpy(), np.repeat(np.arange(len(tasks)), list(map(len, features)))
    out = np.random.default_rng(0).random(len(x)) < 0.2

    def probe(c: float, rows: np.ndarray):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500, class_weight="balanced"))
        return model.fit(x[rows], owner[rows])

    rates = {}
    for c in (1e-3, 1e-2, 1e-1):
        predicted = probe(c, ~out).predict(x[out])
        rates[c] = float(np.mean([(predicted[owner[out] == task] == task).mean() for task in range(len(tasks))]))
    scaler, regression = probe(max(rates, key=rates.get), np.full(len(x), True))
    weights = regression.coef_ / scaler.scale_
    biases = regression.intercept_ - weights @ scaler.mean_
    fitted = {t.name: torch.tensor([*w, b]) for t, w, b in zip(tasks, weights, biases, strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(fitted, path)
    return fitted


def run(seed: int, options: argparse.Namespace, further: list[str]) -> None:
    """Run one seed, or what is left of it."""
    folder = Path(options.output_dir, f"seed_{seed}")
    arguments = ["--methods", *options.methods, "--seeds", str(seed), "--order", "random", "--order_seed", str(seed)]
    arguments += ["--suite", options.suite, *(["--model", options.model] if options.model else [])]
    arguments += ["--protocol", "x_tail", "--selectors", *options.selectors, PROBE, *selector_arguments(options)]
    arguments += ["--steps", "60", "--batch_size", "32", "--cpu", "--output_dir", str(folder)]
    sys.argv = [str(EXAMPLE), *arguments, *(["--resume"] if folder.exists() else []), *further]
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def aims(results: dict, selectors: list[str]) -> Iterator[str]:
    """Tell how far from the known task the choices end, seed by seed."""
    known = results["methods"]
    for method, runs in known.items():
        for selector in [*selectors, PROBE]:
            for decision in ("candidates", "per_image", "soft"):
                chosen = [
                    {"seed": run["seed"], **run["selection"][selector][decision]}
                    for run in runs
                    if decision in run.get("selection", {}).get(selector, {})
                ]
                if chosen and "zero_shot" in known:
                    transfer = estimate(paired_differences(chosen, known["zero_shot"], "transfer"))
                    last = estimate(paired_differences(chosen, runs, "last"))
                    yield (
                        f"{method}, {selector}, {decision}: Transfer - zero-shot's {difference(transfer)}, "
                        f"Last - known task's {difference(last)}"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--selectors", nargs="+", default=["discriminant_classes"])
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--model", help="CLIP by folder or Hub id; default: the embedded one")
    parser.add_argument("--depth", type=int, default=4, help="blocks after which selectors look at the frozen tokens")
    parser.add_argument("--output_dir", default="runs/unknown")
    parser.add_argument("--only_show", action="store_true", help="of the runs that are there")
    arguments = sys.argv[1:]
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options, further = parser.parse_args(arguments[:at]), arguments[at + 1 :]
    if not options.only_show:
        torch.set_num_threads(1)
        ProbeSelector.fitted = fit_probe(options)
        for seed in options.seeds:
            run(seed, options, further)
    results: dict = {"tasks": [], "methods": {}, "settings": {}}
    for seed in options.seeds:
        path = Path(options.output_dir, f"seed_{seed}", "results.json")
        if path.exists():
            of_seed = read_results(path)
            results["settings"] = of_seed["settings"]
            for method, runs in of_seed["methods"].items():
                results["methods"].setdefault(method, []).extend(runs)
    console = Console(width=180)
    print_table(console, summary_rows(results), "The task known")
    print_table(console, selection_rows(results), "Nobody names the task", SELECTION_CAPTION)
    print_table(console, x_tail_rows(results), "X-TAIL", X_TAIL_CAPTION)
    for line in aims(results, options.selectors):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
