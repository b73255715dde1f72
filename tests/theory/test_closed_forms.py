from itertools import product

import pytest
import torch

from peft_moe_merge.theory.closed_forms import (
    expected_curves,
    expected_error,
    mean_task_gap,
    mean_task_power,
    single_expert_error,
    single_expert_forgetting,
)
from peft_moe_merge.theory.simulate import Setting, fit_expert, simulate

R = 0.4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_power_and_gap_are_the_sums_written_out():
    w = normal(4, 3)
    torch.testing.assert_close(mean_task_power(w), sum(w[n] @ w[n] for n in range(4)) / 4)
    gap = sum((w[n] - w[m]) @ (w[n] - w[m]) for n in range(4) for m in range(4)) / 16
    torch.testing.assert_close(mean_task_gap(w), gap)
    torch.testing.assert_close(mean_task_gap(torch.stack([w, 2 * w])), torch.stack([gap, 4 * gap]))


def test_expected_error_is_its_geometric_sum():
    w, heard = normal(3, 5), [0, 2, 2, 1, 0]
    J = len(heard)
    expected = R**J * w[1] @ w[1] + sum(
        (1 - R) * R ** (J - 1 - j) * (w[task] - w[1]).square().sum() for j, task in enumerate(heard)
    )
    torch.testing.assert_close(expected_error(heard, 1, w, R), expected)
    torch.testing.assert_close(expected_error([], 1, w, R), w[1] @ w[1])


def test_expected_error_is_the_mean_over_gaussian_samples():
    weights_ND, heard, runs = normal(3, 10), [0, 2, 2, 1, 0], 20_000
    w_SD = torch.zeros(runs, 10, dtype=torch.float64)
    for seed, task in enumerate(heard, start=1):
        x_SDL = normal(runs, 10, 6, seed=seed)
        w_SD = fit_expert(w_SD, x_SDL, torch.einsum("sdl,d->sl", x_SDL, weights_ND[task]))
    for target in range(3):
        simulated = (w_SD - weights_ND[target]).square().sum(-1).mean().item()
        assert simulated == pytest.approx(expected_error(heard, target, weights_ND, R).item(), rel=0.02)


def test_expected_curves_are_the_definitions_with_expected_error_put_in():
    weights_SND = normal(2, 4, 5)
    generator = torch.Generator().manual_seed(1)
    tasks_ST = torch.randint(4, (2, 9), generator=generator)
    experts_ST = torch.randint(3, (2, 9), generator=generator)
    forgetting_ST, error_ST = expected_curves(tasks_ST, experts_ST, weights_SND, R)

    for s, (tasks, experts) in enumerate(zip(tasks_ST.tolist(), experts_ST.tolist(), strict=True)):

        def at(round: int, tau: int, s=s, tasks=tasks, experts=experts) -> float:
            heard = [tasks[i] for i in range(round) if experts[i] == experts[tau - 1]]
            return expected_error(heard, tasks[tau - 1], weights_SND[s], R).item()

        for t in range(1, 10):
            assert error_ST[s, t - 1].item() == pytest.approx(sum(at(t, tau) for tau in range(1, t + 1)) / t)
            grown = sum(at(t, tau) - at(tau, tau) for tau in range(1, t))
            assert forgetting_ST[s, t - 1].item() == pytest.approx(grown / max(t - 1, 1), abs=1e-12)


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_single_expert_forms_are_exact_averages_over_all_task_sequences(rounds):
    weights_ND = normal(3, 5)
    tasks_ST = torch.tensor(list(product(range(3), repeat=rounds)))
    weights_SND = weights_ND.expand(len(tasks_ST), 3, 5)
    forgetting_ST, error_ST = expected_curves(tasks_ST, torch.zeros_like(tasks_ST), weights_SND, R)
    power, gap = mean_task_power(weights_ND).item(), mean_task_gap(weights_ND).item()
    assert single_expert_forgetting(rounds, power, gap, R) == pytest.approx(
        forgetting_ST[:, -1].mean().item(), abs=1e-12
    )
    assert single_expert_error(rounds, power, gap, R) == pytest.approx(error_ST[:, -1].mean().item())


@pytest.mark.parametrize("signals", ["none", "cluster"])
def test_simulated_curves_of_one_expert_match_within_two_percent(signals):
    run = simulate(Setting(experts=1, stop=False, rounds=12, signals=signals, clusters=6), range(8_000))
    power, gap = mean_task_power(run.weights_SND).mean().item(), mean_task_gap(run.weights_SND).mean().item()
    for t in (4, 8, 12):
        forgetting, error = run.forgetting_ST[:, t - 1].mean().item(), run.error_ST[:, t - 1].mean().item()
        assert forgetting == pytest.approx(single_expert_forgetting(t, power, gap, R), rel=0.02)
        assert error == pytest.approx(single_expert_error(t, power, gap, R), rel=0.02)


def test_simulated_curves_of_several_experts_match_within_two_percent():
    setting = Setting(experts=3, routing="cluster", signals="none", rounds=8)
    run = simulate(setting, range(8_000))
    forgetting_ST, error_ST = expected_curves(run.tasks_ST, run.experts_ST, run.weights_SND, setting.shrinkage)
    for t in (3, 8):
        assert run.forgetting_ST[:, t - 1].mean().item() == pytest.approx(
            forgetting_ST[:, t - 1].mean().item(), rel=0.02
        )
        assert run.error_ST[:, t - 1].mean().item() == pytest.approx(error_ST[:, t - 1].mean().item(), rel=0.02)


def test_shrinkage_is_the_untouched_share_of_features():
    assert Setting(features=10, samples=6).shrinkage == pytest.approx(R)


@pytest.mark.parametrize("shrinkage", [0.0, 1.0, -0.2, float("nan")])
def test_shrinkage_outside_zero_and_one_is_refused(shrinkage):
    with pytest.raises(ValueError, match=r"shrinkage=.*strictly between 0 and 1"):
        single_expert_error(3, 1.0, 1.0, shrinkage)
    with pytest.raises(ValueError, match="shrinkage="):
        expected_error([0], 0, normal(2, 3), shrinkage)


@pytest.mark.parametrize("form", [single_expert_forgetting, single_expert_error])
def test_no_rounds_is_an_error(form):
    with pytest.raises(ValueError, match="rounds=0: expected at least 1"):
        form(0, 1.0, 1.0, R)
