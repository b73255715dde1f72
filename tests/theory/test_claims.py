from dataclasses import replace

import pytest
import torch

from peft_moe_merge.theory.claims import Claim, Criterion, check_claims, rounds_to_converge
from peft_moe_merge.theory.simulate import Setting
from peft_moe_merge.theory.study import run_study


@pytest.fixture(scope="module")
def study():
    return run_study(Setting(rounds=150), range(8), ensemble=200)


def verdicts(study) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in check_claims(study)}


def criteria(study, name: str) -> dict[str, Criterion]:
    return {c.asked: c for claim in check_claims(study) if claim.name == name for c in claim.criteria}


def test_rounds_to_converge_counts_to_the_last_round_above():
    error = torch.tensor([[3.0, 1.0, 3.0, 1.0, 0.5], [0.5, 0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0, 2.0]])
    assert rounds_to_converge(error, torch.tensor(2.0)).tolist() == [4, 1, 6]


def test_verdicts_follow_the_criteria():
    yes, no = Criterion("", "", True), Criterion("", "", False)
    for parts, verdict in (((yes, yes), "holds"), ((yes, no), "holds in part"), ((no, no), "does not hold")):
        assert Claim("", "", parts).verdict == verdict


def test_stopping_helps_here(study):
    assert verdicts(study)["C1"] == "holds"
    assert all(c.holds for asked, c in criteria(study, "C2").items() if "final error" in asked)


def test_claims_fail_when_the_gates_are_exchanged(study):
    exchanged = replace(
        study,
        stopped={m: replace(run, setting=study.stopped[m].setting) for m, run in study.endless.items()},
        endless={m: replace(run, setting=study.endless[m].setting) for m, run in study.stopped.items()},
    )
    assert not any(c.holds for asked, c in criteria(exchanged, "C1").items() if "error falls after" in asked)
    assert not any(c.holds for asked, c in criteria(exchanged, "C2").items() if "final error" in asked)
    assert not any(c.holds for asked, c in criteria(exchanged, "C3").items() if "without stopping" in asked)


def test_claims_fail_when_nothing_is_learnt(study):
    flat = {m: replace(study.single, setting=run.setting) for m, run in study.stopped.items()}
    same = replace(study, stopped=flat)
    assert not any(c.holds for asked, c in criteria(same, "C1").items() if "below one expert's" in asked)
    assert not any(c.holds for asked, c in criteria(same, "C4").items() if "later" in asked or "err less" in asked)


def test_formulas_fail_when_the_simulation_is_off(study):
    off = {kind: replace(run, error_ST=1.2 * run.error_ST) for kind, run in study.ensemble.items()}
    held = criteria(replace(study, ensemble=off), "Formulas")
    assert not any(c.holds for asked, c in held.items() if "error" in asked)


def test_a_study_needs_seeds_for_an_interval_and_rounds_for_the_exploration():
    with pytest.raises(ValueError, match="at least two"):
        run_study(Setting(), [0])
    with pytest.raises(ValueError, match="ensemble=0"):
        run_study(Setting(), range(2), ensemble=0)
    with pytest.raises(ValueError, match="exploration takes 100 rounds"):
        run_study(Setting(rounds=60), range(2))
    with pytest.raises(ValueError, match="rounds=100: exploration takes 100"):
        run_study(Setting(rounds=100), range(2))


def test_runs_of_a_study_meet_the_same_data(study):
    groups = (study.stopped, study.endless, study.oracles, study.explore, study.noise, study.flags)
    for run in (run for group in groups for run in group.values()):
        assert torch.equal(run.tasks_ST, study.single.tasks_ST)
        assert torch.equal(run.weights_SND, study.single.weights_SND)
    assert torch.equal(study.explore[25].error_ST, study.stopped[5].error_ST)
    assert study.noise[0.003] is study.stopped[5]
