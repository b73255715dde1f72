"""Which pictures the results of a stream have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from peft_moe_merge.report.plots import STYLE

from .expert_figures import (
    activation_map,
    block_label,
    frozen_figure,
    merge_figure,
    selection_over_training,
    usage_figure,
)
from .figures import accuracy_figure, confusion_figure, growth, loss_figure, metric_figure, plasticity
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
        pictures |= _watched(tasks, methods)
    return pictures


def _watched(tasks: list[str], methods: dict[str, Runs]) -> Pictures:
    """Draw what was noted of experts, where runs were asked to (`--expert_figures`)."""
    pictures: Pictures = {}
    grown = {}
    for name, runs in methods.items():
        for run in (run for run in runs if any(run.get("snapshots") or ())):
            of_tasks = {task: of_task for task, of_task in zip(tasks, run["snapshots"], strict=False) if of_task}
            pictures[f"selected_{name}"] = (
                selection_over_training(of_tasks),
                f"{name}: selections of each expert in percent, from snapshot to snapshot, in layers evenly over the network, "
                f"{_seeds([run])}.",
            )
            break
        for run in runs:
            merged = [(task, told) for task, told in zip(tasks, run.get("activations") or (), strict=False) if told]
            if merged:
                task, told = merged[-1]
                stages = {f"{when} merging": (told[when], told[f"{when}_experts"]) for when in ("before", "after")}
                pictures[f"activations_{name}"] = (
                    activation_map(stages, seed=run["seed"]),
                    f"{name}: what experts of {block_label(told['block'])} add to some images of {task}, before and after "
                    f"the first merge of that task, which changed experts {', '.join(map(str, told['changed']))}, {_seeds([run])}; "
                    "one t-SNE of both, of the first principal components. What adds nothing yet is left out.",
                )
                break
        # a run that was not watched from its first task on does not tell how large the adapter was before
        whole = [run for run in runs if run.get("adapter_bytes") and None not in run["adapter_bytes"]]
        if whole:
            grown[name] = {
                "parameters": [run["adapter_parameters"] for run in whole],
                "memory": [run["adapter_bytes"] for run in whole],
            }
    if grown:
        pictures["growth"] = (growth(grown), "Parameters and memory of experts and routers by the number of tasks.")
    return pictures


def _confusion(run: dict[str, Any], selector: str) -> list | None:
    return ((run.get("selection") or {}).get(selector) or {}).get("per_image", {}).get("confusion")


def _seeds(runs: Runs) -> str:
    numbers = ", ".join(str(run["seed"]) for run in runs)
    return f"mean of seeds {numbers}" if len(runs) > 1 else f"seed {numbers}"
