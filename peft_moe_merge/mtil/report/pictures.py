"""Which pictures the results of a stream have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from peft_moe_merge.report.plots import STYLE

from .expert_figures import frozen_figure, merge_figure, usage_figure
from .figures import accuracy_figure, confusion_figure, loss_figure, metric_figure, plasticity
from .tables import selectors, x_tail_runs

Runs = list[dict[str, Any]]
Pictures = dict[str, tuple[Figure, str]]

INSIDE: list[tuple[str, Callable[[list[str], Runs], Figure], str]] = [
    ("losses", loss_figure, "Training loss; pale: each step, strong: running mean"),
    ("frozen", frozen_figure, "Frozen experts per block after each task"),
    ("usage", usage_figure, "Selections of each expert by each task's routers in training, in percent"),
    ("merges", merge_figure, "Merge events: two experts (rings) and the one they overwrite (dot)"),
]


def draw_all(results: dict[str, Any]) -> Pictures:
    """Draw what there is to see: per name a figure and its caption.

    What happened inside a method (losses, merges, frozen experts, usage) is drawn where its runs have it.
    """
    tasks, methods, pictures = results["tasks"], results["methods"], {}
    with matplotlib.rc_context(STYLE):
        if methods:
            pictures["metrics"] = (
                metric_figure(methods),
                "Mean over seeds, with Student's 95 % interval where there are several.",
            )
            pictures["plasticity"] = (
                plasticity({name: [run["matrix"] for run in runs] for name, runs in methods.items()}, tasks),
                "Accuracy on each task right after its training; mean over seeds, and bands: Student's 95 % interval where "
                "there are several.",
            )
        if of_x_tail := x_tail_runs(results):
            labelled = {", ".join(part for part in how if part != "nobody"): runs for how, runs in of_x_tail.items()}
            pictures["x_tail"] = (
                metric_figure(labelled),
                "Among the classes of all tasks, nobody names the task; mean over seeds, with Student's 95 % interval where "
                "there are several.",
            )
        for name, runs in methods.items():
            pictures[f"accuracy_{name}"] = (
                accuracy_figure(tasks, runs),
                f"{name}: accuracy in percent, {_seeds(runs)}; on and below the diagonal the task has been learnt.",
            )
        for name, runs in methods.items():
            for selector in selectors(runs):
                shown = [run for run in runs if _confusion(run, selector)]
                if shown:
                    pictures[f"selection_{name}_{selector}"] = (
                        confusion_figure(tasks, shown, selector),
                        f"{name}: tasks that {selector} chose, image by image, in percent of a data set's images, "
                        f"{_seeds(shown)}; half-way and at the end.",
                    )
        for what, draw, caption in INSIDE:
            for name, runs in methods.items():
                # a method that could have merged and did not has tasks without merges
                shown = [run for run in runs if any(run.get(what) or ())]
                if what in ("usage", "merges"):
                    shown = shown[:1]
                if shown:
                    pictures[f"{what}_{name}"] = (draw(tasks, shown), f"{name}: {caption}, {_seeds(shown)}.")
    return pictures


def _confusion(run: dict[str, Any], selector: str) -> list | None:
    return ((run.get("selection") or {}).get(selector) or {}).get("per_image", {}).get("confusion")


def _seeds(runs: Runs) -> str:
    numbers = ", ".join(str(run["seed"]) for run in runs)
    return f"mean of seeds {numbers}" if len(runs) > 1 else f"seed {numbers}"
