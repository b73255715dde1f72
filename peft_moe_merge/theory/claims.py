"""Does the theory hold here? Each claim gets its verdict from the runs of a study, with the numbers that decide.

Comparisons are paired over seeds and hold when all of the 95 % interval says so (see `peft_moe_merge.report.statistics`), not
the mean alone; thresholds are compared with the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from peft_moe_merge.report.statistics import Estimate, estimate
from peft_moe_merge.report.tables import spread

from .closed_forms import mean_task_gap, mean_task_power, single_expert_error, single_expert_forgetting
from .specialisation import MEASURES, gate_gap
from .study import EXPERTS, Study

Verdict = Literal["holds", "holds in part", "does not hold"]

AGREES = 0.02  # closed forms: relative deviation of the simulated mean
CHECKED_ROUNDS = (2, 6, 12, 30)
LOST_SHARE = 0.2  # C2: of the gain that stopping brings, a gate that never stops may keep at most this much
CLEAN = 0.9  # C3: purity, rounds at home and evenness, each at most 1, should reach this
LEARNT_SHARE = 0.5  # C4: converged means: error below this share of the single expert's, from then on


@dataclass(frozen=True)
class Criterion:
    """One measurable part of a claim: what was asked, what came out, whether it holds."""

    asked: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class Claim:
    """A claim of the theory and its criteria."""

    name: str
    statement: str
    criteria: tuple[Criterion, ...]

    @property
    def verdict(self) -> Verdict:
        """All criteria, some, or none."""
        held = [criterion.holds for criterion in self.criteria]
        return "holds" if all(held) else "holds in part" if any(held) else "does not hold"


def show(values_S: Tensor, digits: int = 2) -> str:
    """Mean and half of its 95 % interval, as text."""
    return spread(_estimate(values_S), digits)


def rounds_to_converge(error_ST: Tensor, level: Tensor) -> Tensor:
    """Rounds after which the error stays below a level.

    Args:
        error_ST: error after each round.
        level: scalar.

    Returns:
        `[S]`, as floating point; the number of rounds plus one for a seed that is not below it at the end.
    """
    above_ST = error_ST >= level
    T = error_ST.shape[1]
    return (above_ST * torch.arange(1, T + 1)).amax(1).double() + 1


def check_claims(study: Study) -> list[Claim]:
    """Check the closed forms and claims C1 to C4.

    Args:
        study: the runs.

    Returns:
        The claims, with their criteria and verdicts.
    """
    return [
        _closed_forms(study),
        _forgets_less(study),
        _never_stopping_unlearns(study),
        _even_sets(study),
        _more_experts_later(study),
    ]


def _below(asked: str, left_S: Tensor, right_S: Tensor) -> Criterion:
    """Is left below right? Paired over seeds."""
    difference = _estimate(left_S - right_S)
    measured = f"{show(left_S)} against {show(right_S)}; difference {_signed(difference)}"
    return Criterion(asked, measured, _negative(difference))


def _at_least(asked: str, values_S: Tensor, threshold: float) -> Criterion:
    mean = _estimate(values_S).mean
    return Criterion(f"{asked} at least {threshold}", show(values_S), mean is not None and mean >= threshold)


def _closed_forms(study: Study) -> Claim:
    criteria = []
    for kind, run in study.ensemble.items():
        power, gap = mean_task_power(run.weights_SND).mean().item(), mean_task_gap(run.weights_SND).mean().item()
        for name, curve_ST, formula in (
            ("forgetting", run.forgetting_ST, single_expert_forgetting),
            ("error", run.error_ST, single_expert_error),
        ):
            for t in CHECKED_ROUNDS:
                simulated, expected = curve_ST[:, t - 1].mean().item(), formula(t, power, gap, run.setting.shrinkage)
                off = simulated / expected - 1
                samples = "Gaussian samples" if kind == "none" else "one signal sample a round"
                criteria.append(
                    Criterion(
                        f"one expert, {samples}: {name} at round {t} within {AGREES:.0%} of its formula",
                        f"{simulated:.3f} simulated, {expected:.3f} by formula: {off:+.1%}",
                        abs(off) <= AGREES,
                    )
                )
    return Claim("Formulas", "One expert's mean forgetting and error follow the closed forms.", tuple(criteria))


def _forgets_less(study: Study) -> Claim:
    criteria = []
    for m in EXPERTS:
        run, stop = study.stopped[m], study.stopped[m].setting.exploration_rounds - 1
        for name, curve, single in (
            ("forgetting", run.forgetting_ST, study.single.forgetting_ST),
            ("error", run.error_ST, study.single.error_ST),
        ):
            criteria.append(_below(f"{m} experts: final {name} below one expert's", curve[:, -1], single[:, -1]))
            criteria.append(_below(f"{m} experts: {name} falls after the stop", curve[:, -1], curve[:, stop]))
    return Claim(
        "C1", "Experts whose gate stops forget less and err less than one expert, and keep improving.", tuple(criteria)
    )


def _never_stopping_unlearns(study: Study) -> Claim:
    criteria = []
    for m in EXPERTS:
        for name, final in (
            ("forgetting", lambda run: run.forgetting_ST[:, -1]),
            ("error", lambda run: run.error_ST[:, -1]),
        ):
            criteria.append(_share_kept(m, name, study, final))
        gap_ST = gate_gap(study.endless[m])
        stop = study.stopped[m].setting.exploration_rounds - 1
        criteria.append(
            Criterion(
                f"{m} experts: gate gap shrinks from round {stop + 1} to the last",
                f"{show(gap_ST[:, stop], 4)} to {show(gap_ST[:, -1], 4)}",
                _negative(_estimate(gap_ST[:, -1] - gap_ST[:, stop])),
            )
        )
    return Claim(
        "C2", "A gate that never stops loses its specialisation: errors stay near one expert's.", tuple(criteria)
    )


def _share_kept(m: int, name: str, study: Study, final: Callable) -> Criterion:
    single_S, stopped_S, endless_S = final(study.single), final(study.stopped[m]), final(study.endless[m])
    # A ratio of means: single seeds may gain nothing, and dividing by that would say nothing.
    kept = ((single_S - endless_S).mean() / (single_S - stopped_S).mean()).item()
    return Criterion(
        f"{m} experts: of the gain in final {name}, at most {LOST_SHARE:.0%} without stopping",
        f"{kept:.0%} ({show(endless_S)} without, {show(stopped_S)} with stopping, {show(single_S)} one expert)",
        _negative(_estimate(stopped_S - single_S)) and kept <= LOST_SHARE,
    )


def _even_sets(study: Study) -> Claim:
    criteria = []
    for m in EXPERTS:
        run = study.stopped[m]
        endless_S, stopped_S = MEASURES["purity"](study.endless[m]), MEASURES["purity"](run)
        criteria.append(_below(f"{m} experts: purity without stopping below that with it", endless_S, stopped_S))
        criteria += [_at_least(f"{m} experts: {name}", measure(run), CLEAN) for name, measure in MEASURES.items()]
    return Claim(
        "C3", "After the stop, sets of experts match clusters, and load is even inside a set.", tuple(criteria)
    )


def _more_experts_later(study: Study) -> Claim:
    level = LEARNT_SHARE * study.single.error_ST[:, -1].mean()
    early = study.stopped[EXPERTS[-1]].setting.exploration_rounds
    criteria = []
    for few, many in pairwise(EXPERTS):
        few_ST, many_ST = study.stopped[few].error_ST, study.stopped[many].error_ST
        criteria.append(
            _below(f"{few} experts err less than {many} at round {early}", few_ST[:, early - 1], many_ST[:, early - 1])
        )
        few_S, many_S = rounds_to_converge(few_ST, level), rounds_to_converge(many_ST, level)
        later = _estimate(many_S - few_S)
        criteria.append(
            Criterion(
                f"{many} experts converge later than {few} (error below {level:.2f} for good)",
                f"round {show(many_S, 0)} against {show(few_S, 0)}; difference {_signed(later, 0)}; not yet at the end "
                f"(counted as the round after it): {_late(many_S, many_ST)} against {_late(few_S, few_ST)} of {len(few_S)} seeds",
                _negative(_estimate(few_S - many_S)),
            )
        )
        gain = _estimate(many_ST[:, -1] - few_ST[:, -1])
        criteria.append(
            Criterion(
                f"{many} experts do not end better than {few}",
                f"error {show(many_ST[:, -1])} against {show(few_ST[:, -1])}; difference {_signed(gain)}",
                not _negative(gain),
            )
        )
    return Claim("C4", "More experts converge later and do not end better.", tuple(criteria))


def _late(rounds_S: Tensor, error_ST: Tensor) -> int:
    return int((rounds_S > error_ST.shape[1]).sum())


def _estimate(values_S: Tensor) -> Estimate:
    return estimate(values_S.tolist())


def _negative(known: Estimate) -> bool:
    """Does all of the interval lie below 0?"""
    return known.high is not None and known.high < 0


def _signed(known: Estimate, digits: int = 2) -> str:
    text = spread(known, digits)
    return text if known.mean is None or text.startswith("-") else f"+{text}"
