"""The study in pictures. Bands and bars are 95 % intervals over seeds."""

from collections.abc import Callable, Mapping

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from peft_moe_merge.report.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, STYLE, line
from peft_moe_merge.report.statistics import interval

from .closed_forms import (
    expected_curves,
    mean_task_gap,
    mean_task_power,
    single_expert_error,
    single_expert_forgetting,
)
from .simulate import Run
from .specialisation import MEASURES, gate_gap, loads
from .study import EXPERTS, Study

SINGLE, STOPPED, ENDLESS, ORACLE = GREY, BLUE, RED, GREEN
SIZE_COLOURS = dict(zip(EXPERTS, (BLUE, PINK, ORANGE), strict=True))


@matplotlib.rc_context(STYLE)
def draw_all(study: Study) -> dict[str, tuple[Figure, str]]:
    """All figures of a study.

    Args:
        study: the runs.

    Returns:
        Figure and caption by name, in the order to be read.
    """
    rounds = study.base.rounds
    return {
        "closed_forms": (
            closed_forms(study),
            "One expert: simulated mean against the closed forms. Right: several experts with a gate that stops, against "
            "the expectation given the routing that happened.",
        ),
        "curves": (
            curves(study),
            "Forgetting and error over rounds, with a gate that stops (blue; the dotted line is when) and one that never does "
            "(orange), beside one expert (grey) and an oracle with one expert for each cluster (green).",
        ),
        "experts": (
            experts(study),
            f"How many experts? Error over rounds, and forgetting and error at round {rounds}.",
        ),
        "gate_gap": (
            gate_gaps(study),
            "How far apart the experts' scores of a signal are. A stopped gate keeps its gaps, an endless one evens them out.",
        ),
        "explore": (
            explore(study),
            f"When to stop: forgetting and error at round {rounds} by rounds of exploration, {study.base.experts} experts.",
        ),
        "noise": (
            noise(study),
            "How much routing noise: too much routes at random, too little leaves the experts of a set idle. Left, the final "
            "forgetting and error; right, what the gate made of its experts after the stop.",
        ),
        "loads": (
            expert_loads(study),
            f"Who hears what after the stop, seed {study.seeds[0]}: rounds by expert and task (tasks sorted by cluster; white lines "
            "part clusters), with a gate that stopped and one that did not.",
        ),
        "specialisation": (
            specialisation(study),
            "Rounds after the stop: purity of experts, share heard in the set of their cluster, evenness inside a set. The endless "
            "gate is measured over the same rounds.",
        ),
        "flag_rules": (
            flag_rules(study),
            "When each reading of the stop rule stops, by gap: median and range over seeds. Seeds that never stop are at "
            "the top; the dotted line ends exploration.",
        ),
    }


def closed_forms(study: Study) -> Figure:
    """Simulated means on the closed forms."""
    figure, axes = _panels(3)
    for ax, name, formula in (
        (axes[0], "forgetting", single_expert_forgetting),
        (axes[1], "error", single_expert_error),
    ):
        for (kind, run), colour, marker in zip(study.ensemble.items(), (STOPPED, ENDLESS), "ox", strict=False):
            power, gap = mean_task_power(run.weights_SND).mean().item(), mean_task_gap(run.weights_SND).mean().item()
            t = range(1, run.setting.rounds + 1)
            label = "Gaussian samples" if kind == "none" else "one signal sample"
            ax.plot(t, _curve(run, name).mean(0), marker, color=colour, markersize=4, label=label)
        ax.plot(t, [formula(i, power, gap, run.setting.shrinkage) for i in t], color=SINGLE, label="closed form")
        ax.set(xlabel="round", ylabel=name, title=f"one expert, {len(run.tasks_ST):,} seeds")
        ax.legend()
    for m in EXPERTS:
        run = study.stopped[m]
        expected_ST = expected_curves(run.tasks_ST, run.experts_ST, run.weights_SND, run.setting.shrinkage)[1]
        _line(axes[2], run.error_ST, SIZE_COLOURS[m], f"{m} experts, simulated")
        axes[2].plot(_rounds(run), expected_ST.mean(0), "--", color=SINGLE, linewidth=1)
    axes[2].plot([], [], "--", color=SINGLE, linewidth=1, label="expected, given the routing")
    axes[2].set(xlabel="round", ylabel="error", xscale="log", title=f"gate stops, {len(study.seeds)} seeds")
    axes[2].legend()
    return figure


def curves(study: Study) -> Figure:
    """Forgetting and error over rounds, one column for each number of experts."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, len(EXPERTS), sharex=True, sharey="row")
    for row, name in zip(grid, ("forgetting", "error"), strict=True):
        for ax, m in zip(row, EXPERTS, strict=True):
            _line(ax, _curve(study.single, name), SINGLE, "one expert")
            _line(ax, _curve(study.endless[m], name), ENDLESS, "never stops")
            _line(ax, _curve(study.stopped[m], name), STOPPED, "stops")
            _line(ax, _curve(study.oracles["cluster"], name), ORACLE, "oracle")
            ax.axvline(study.stopped[m].setting.exploration_rounds, color=STOPPED, linestyle=":")
            ax.set(title=f"{m} experts", xscale="log")
        row[0].set_ylabel(name)
    for ax in grid[-1]:
        ax.set_xlabel("round")
    grid[0, 0].legend()
    return figure


def experts(study: Study) -> Figure:
    """Error over rounds and final values by number of experts."""
    figure, axes = _panels(3)
    _line(axes[0], study.single.error_ST, SINGLE, "one expert")
    for m in EXPERTS:
        _line(axes[0], study.stopped[m].error_ST, SIZE_COLOURS[m], f"{m} experts, gate stops")
    axes[0].set(xlabel="round", ylabel="error", xscale="log")
    axes[0].legend()
    for ax, name in zip(axes[1:], ("forgetting", "error"), strict=True):
        _points(ax, {1: study.single}, lambda run, name=name: _curve(run, name)[:, -1], SINGLE, "one expert", "s")
        _points(ax, study.endless, lambda run, name=name: _curve(run, name)[:, -1], ENDLESS, "never stops", "o-")
        _points(ax, study.stopped, lambda run, name=name: _curve(run, name)[:, -1], STOPPED, "stops", "o-")
        ax.set(xlabel="experts", ylabel=f"final {name}", xticks=[1, *EXPERTS], ylim=(0, None))
        ax.legend()
    return figure


def gate_gaps(study: Study) -> Figure:
    """Gap between the highest and the lowest score of a signal over rounds."""
    figure, axes = _panels(len(EXPERTS))
    for ax, m in zip(axes, EXPERTS, strict=True):
        _line(ax, gate_gap(study.endless[m]), ENDLESS, "never stops")
        _line(ax, gate_gap(study.stopped[m]), STOPPED, "stops")
        ax.set(xlabel="round", ylabel="gate gap", title=f"{m} experts", xscale="log", ylim=(0, None))
    axes[0].legend()
    return figure


def explore(study: Study) -> Figure:
    """Final forgetting and error by rounds of exploration."""
    figure, axes = _panels(2)
    for ax, name in zip(axes, ("forgetting", "error"), strict=True):
        _level(ax, _curve(study.single, name)[:, -1], SINGLE, "one expert")
        if study.base.experts in study.endless:
            _level(ax, _curve(study.endless[study.base.experts], name)[:, -1], ENDLESS, "never stops")
        _points(ax, study.explore, lambda run, name=name: _curve(run, name)[:, -1], STOPPED, "stops", "o-")
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xticks(list(study.explore), labels=[str(t) for t in study.explore])
        ax.set(xlabel="rounds of exploration", ylabel=f"final {name}", ylim=(0, None))
        ax.legend()
    return figure


def noise(study: Study) -> Figure:
    """Final forgetting and error, and specialisation, by routing noise."""
    figure, axes = _panels(2)
    for name, colour in (("forgetting", ENDLESS), ("error", STOPPED)):
        _points(axes[0], study.noise, lambda run, name=name: _curve(run, name)[:, -1], colour, name, "o-")
    for (name, measure), colour in zip(MEASURES.items(), (STOPPED, ORACLE, ENDLESS), strict=True):
        _points(axes[1], study.noise, measure, colour, name, "o-")
    for ax in axes:
        ax.set_xscale("symlog", linthresh=0.001)
        ax.set_xticks(list(study.noise), labels=[f"{x:g}" for x in study.noise])
        ax.set(xlabel="routing noise", ylim=(0, None), title=f"{study.base.experts} experts, gate stops")
        ax.legend()
    return figure


def expert_loads(study: Study) -> Figure:
    """Rounds by expert and task after the stop, first seed."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    grid = figure.subplots(2, len(EXPERTS))
    order = study.base.cluster_of_task.argsort(stable=True)
    borders = study.base.cluster_of_task[order].diff().nonzero().flatten() + 0.5
    for row, runs, label in zip(grid, (study.stopped, study.endless), ("stops", "never stops"), strict=True):
        for ax, m in zip(row, EXPERTS, strict=True):
            start = study.stopped[m].setting.exploration_rounds + 1
            image = ax.imshow(loads(runs[m], start)[0][:, order], aspect="auto", cmap="viridis", vmin=0)
            for border in borders:
                ax.axvline(border, color="white")
            ax.set(title=f"{m} experts, {label}", xticks=range(len(order)), xlabel="task", ylabel="expert")
            ax.set_xticklabels(order.tolist())
            ax.yaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, ax=ax, label="rounds")
    return figure


def specialisation(study: Study) -> Figure:
    """Purity, rounds at home and evenness by number of experts."""
    figure, axes = _panels(3)
    for ax, (name, measure) in zip(axes, MEASURES.items(), strict=True):
        _points(ax, study.stopped, measure, STOPPED, "stops", "o-")
        _points(ax, study.endless, measure, ENDLESS, "never stops", "o-")
        ax.set(xlabel="experts", ylabel=name, xticks=EXPERTS, ylim=(0, 1.05))
        ax.legend()
    return figure


def flag_rules(study: Study) -> Figure:
    """Round of the stop by gap and reading of the rule."""
    figure, axes = _panels(len(EXPERTS))
    never = study.base.rounds
    for ax, m in zip(axes, EXPERTS, strict=True):
        for rule, colour, label in (("lt", STOPPED, "closer than the gap"), ("gt", ENDLESS, "farther than the gap")):
            runs = {gap: run for (r, size, gap), run in study.flags.items() if (r, size) == (rule, m)}
            stops = [torch.where(run.frozen_at_S > 0, run.frozen_at_S, never).double() for run in runs.values()]
            middle = torch.stack([stop.median() for stop in stops])
            spread = torch.stack(
                [middle - torch.stack([s.min() for s in stops]), torch.stack([s.max() for s in stops]) - middle]
            )
            ax.errorbar(list(runs), middle, yerr=spread, fmt="o-", color=colour, label=label, capsize=3)
        ax.axhline(study.stopped[m].setting.exploration_rounds, color=SINGLE, linestyle=":")
        ax.set(xlabel="gap", ylabel="round of the stop", title=f"{m} experts", xscale="log", yscale="log")
    axes[0].legend()
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.4 * count, 3.8), layout="constrained")
    return figure, list(figure.subplots(1, count))


def _curve(run: Run, name: str) -> Tensor:
    return {"forgetting": run.forgetting_ST, "error": run.error_ST}[name]


def _rounds(run: Run) -> range:
    return range(1, run.setting.rounds + 1)


def _line(ax: Axes, values_ST: Tensor, colour: str, label: str) -> None:
    line(ax, range(1, values_ST.shape[1] + 1), values_ST, label, color=colour)


def _points(ax: Axes, runs: Mapping, measure: Callable[[Run], Tensor], colour: str, label: str, style: str) -> None:
    means, halves = zip(*(interval(measure(run)) for run in runs.values()), strict=True)
    ax.errorbar(list(runs), means, yerr=halves, fmt=style, color=colour, label=label, capsize=3)


def _level(ax: Axes, values_S: Tensor, colour: str, label: str) -> None:
    mean, half = interval(values_S)
    ax.axhline(mean, color=colour, label=label)
    ax.axhspan(mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
