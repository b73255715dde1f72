"""The runs behind the claims, all on the same seeds: differences between runs are paired."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from .simulate import Run, Setting, simulate

EXPERTS = (5, 10, 20)
EXPLORE = (0, 10, 25, 50, 100, 200, 400)
NOISE = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
GAPS = (0.002, 0.01, 0.02, 0.32)
ENSEMBLE = 32000  # seeds; luck in drawing tasks then moves the mean of round 2 by less than 1 %
ENSEMBLE_ROUNDS = 30


@dataclass(frozen=True)
class Study:
    """Runs by what they vary; everything else is `base`.

    Attributes:
        base: the common setting.
        seeds: seeds of every run.
        single: one expert.
        stopped: by number of experts, the gate stopped by the rule.
        endless: by number of experts, the gate never stops.
        oracles: "cluster" and "task", each of which has an expert to itself.
        explore: by rounds of exploration.
        noise: by routing noise.
        flags: by reading of the stop rule, number of experts and gap.
        ensemble: one expert, a few rounds, very many seeds (0, 1, 2, ...), by kind of signal: "none", where the
            closed forms are exact, and that of `base`.
    """

    base: Setting
    seeds: Sequence[int]
    single: Run
    stopped: dict[int, Run]
    endless: dict[int, Run]
    oracles: dict[str, Run]
    explore: dict[int, Run]
    noise: dict[float, Run]
    flags: dict[tuple[str, int, float], Run]
    ensemble: dict[str, Run]


def run_study(base: Setting, seeds: Sequence[int], ensemble: int = ENSEMBLE) -> Study:
    """Simulate everything the claims and figures need.

    Args:
        base: common setting; the sweeps use its number of experts.
        seeds: at least two, for an interval.
        ensemble: number of seeds of the check of the closed forms.

    Returns:
        The runs.

    Raises:
        ValueError: too few seeds, or a setting of the study does not fit `base` (too few rounds for the
            exploration of the most experts, for instance). Raised before anything is simulated.
    """
    if len(seeds) < 2:
        raise ValueError(f"seeds={list(seeds)}: intervals over seeds need at least two.")
    if ensemble < 1:
        raise ValueError(f"ensemble={ensemble}: the check of the closed forms needs at least one seed.")
    settings: dict[str, dict] = {
        "single": {1: replace(base, experts=1, stop=False)},
        "stopped": {m: replace(base, experts=m, explore=None) for m in EXPERTS},
        "endless": {m: replace(base, experts=m, stop=False) for m in EXPERTS},
        "oracles": {
            "cluster": replace(base, experts=base.clusters, routing="cluster"),
            "task": replace(base, experts=base.tasks, routing="task"),
        },
        "explore": {t: replace(base, explore=t) for t in EXPLORE if t <= base.rounds},
        "noise": {noise: replace(base, routing_noise=noise) for noise in NOISE},
        "flags": {
            (rule, m, gap): replace(base, experts=m, gap=gap, flag_rule=rule)
            for rule in ("lt", "gt")
            for m in EXPERTS
            for gap in GAPS
        },
    }
    explored = max(setting.exploration_rounds for setting in settings["stopped"].values())
    if base.rounds <= explored:
        raise ValueError(f"rounds={base.rounds}: exploration takes {explored}, and the claims need rounds after it.")
    brief = {
        kind: replace(base, experts=1, stop=False, rounds=ENSEMBLE_ROUNDS, signals=kind)
        for kind in dict.fromkeys(("none", base.signals))
    }
    # Groups share settings, and a setting is run once.
    distinct = dict.fromkeys(setting for group in settings.values() for setting in group.values())
    with tqdm(total=len(distinct) + len(brief), desc="simulating", unit="run") as progress:
        runs: dict[Setting, Run] = {}
        for setting in distinct:
            runs[setting] = simulate(setting, seeds)
            progress.update()
        ensembles: dict[str, Run] = {}
        for kind, setting in brief.items():
            ensembles[kind] = simulate(setting, range(ensemble))
            progress.update()
    done = {name: {key: runs[setting] for key, setting in group.items()} for name, group in settings.items()}
    return Study(base=base, seeds=seeds, single=done.pop("single")[1], ensemble=ensembles, **done)
