"""What forgetting and error are on average, without simulating: exact for Gaussian samples.

Shapes: S seeds, T rounds, N tasks, M experts, D features.

Everything here follows from one round. Let an expert w hear task l through L < D samples with Gaussian columns X, and let
P be the projection onto their span. The smallest change that fits the labels Xᵀw_l gives w' = w + P(w_l - w), so for
any target w_n

    w' - w_n = (I - P)(w - w_n) + P(w_l - w_n).

The two parts are orthogonal, and the span of Gaussian columns points in every direction alike, E[P] = (L/D) I. With
r = 1 - L/D therefore

    E‖w' - w_n‖² = r ‖w - w_n‖² + (1 - r) ‖w_l - w_n‖².                                                        (*)

The setting is that of Li et al., "Theory on Mixture-of-Experts in Continual Learning", ICLR 2025 (arXiv 2406.16437); the
formulas are derived here. They count that the round's own task is among the tasks an expert heard.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def mean_task_power(weights_ND: Tensor) -> Tensor:
    """A = (1/N) Σ_n ‖w_n‖²: the error on an average task of an expert that knows nothing. Shape `[...]`."""
    return weights_ND.square().sum(-1).mean(-1)


def mean_task_gap(weights_ND: Tensor) -> Tensor:
    """B = (1/N²) Σ_n Σ_n' ‖w_n - w_n'‖²: the error on one task of the truth of another one. Shape `[...]`."""
    return _squared_gaps(weights_ND).mean((-2, -1))


def expected_error(heard: Sequence[int], target: int, weights_ND: Tensor, shrinkage: float) -> Tensor:
    """Expected `‖w - w_n‖²` of an expert, zero at first, that heard some tasks in order.

    (*) applied once for each task heard, l_1 ... l_J, starting from ‖0 - w_n‖²:

        r^J ‖w_n‖² + Σ_j (1 - r) r^(J - j) ‖w_{l_j} - w_n‖².

    Args:
        heard: indices of the tasks in the order they were heard.
        target: task n whose error is asked for.
        weights_ND: true weights of the tasks.
        shrinkage: r = 1 - samples / features.

    Returns:
        Scalar.

    Raises:
        ValueError: `shrinkage` is not between 0 and 1.
    """
    _check_shrinkage(shrinkage)
    error = weights_ND[target].square().sum()
    for task in heard:
        error = shrinkage * error + (1 - shrinkage) * (weights_ND[task] - weights_ND[target]).square().sum()
    return error


def expected_curves(
    tasks_ST: Tensor, experts_ST: Tensor, weights_SND: Tensor, shrinkage: float
) -> tuple[Tensor, Tensor]:
    """Expected forgetting and error after every round, given which expert heard which task.

    (*) applied to every pair of expert and task; an expert that does not hear the round keeps its errors. Forgetting and
    error are then the averages over rounds that define them:

        F_t = (1/(t-1)) Σ_{tau<t} [E_tau(t) - E_tau(tau)]    and    G_t = (1/t) Σ_{tau<=t} E_tau(t),

    with E_tau(t) the error on the task of round tau, at round t, of the expert that heard it. Exact when the routing does
    not depend on the samples (oracle, random, one expert); close when it does so through the signal only.

    Args:
        tasks_ST: task of each round.
        experts_ST: expert of each round.
        weights_SND: true weights of the tasks.
        shrinkage: r = 1 - samples / features.

    Returns:
        Forgetting and error, `[S, T]` each.

    Raises:
        ValueError: `shrinkage` is not between 0 and 1.
    """
    _check_shrinkage(shrinkage)
    S, T = tasks_ST.shape
    every_S = torch.arange(S)
    gaps_SNN = _squared_gaps(weights_SND)
    M = int(experts_ST.max()) + 1
    error_SMN = weights_SND.square().sum(-1).unsqueeze(1).repeat(1, M, 1)
    heard_SMN = torch.zeros_like(error_SMN)
    first_error_S = torch.zeros(S, dtype=error_SMN.dtype)
    forgetting, error = [], []
    for t in range(1, T + 1):
        task_S, expert_S = tasks_ST[:, t - 1], experts_ST[:, t - 1]
        error_SMN[every_S, expert_S] = (
            shrinkage * error_SMN[every_S, expert_S] + (1 - shrinkage) * gaps_SNN[every_S, task_S]
        )
        heard_SMN[every_S, expert_S, task_S] += 1
        first_error_S = first_error_S + error_SMN[every_S, expert_S, task_S]
        total_S = (heard_SMN * error_SMN).sum((1, 2))
        forgetting.append((total_S - first_error_S) / max(t - 1, 1))
        error.append(total_S / t)
    return torch.stack(forgetting, 1), torch.stack(error, 1)


def single_expert_forgetting(rounds: int, power: float, gap: float, shrinkage: float) -> float:
    """Expected forgetting F_T of one expert that hears T tasks, each drawn uniformly from the pool.

    The task of round tau is heard in round tau, at no error, and each of the T - 1 other rounds brings a random task, at
    gap B on average. Applying (*) round by round, the expected error on the task of round tau is

        after round tau:  r^tau A + (r - r^tau) B
        after round T:    r^T A + [(1 - r^T) - (1 - r) r^(T - tau)] B,

    where the first line is the second with T = tau, as (1 - r^tau) - (1 - r) = r - r^tau. Their difference, averaged over
    tau < T, is

        F_T = (1/(T-1)) Σ_{tau<T} { (r^T - r^tau) A + [(1 - r)(1 - r^(T-tau)) + r^tau - r^T] B }.

    Args:
        rounds: T.
        power: A, see `mean_task_power`.
        gap: B, see `mean_task_gap`.
        shrinkage: r = 1 - samples / features.

    Returns:
        F_T; 0 for a single round.

    Raises:
        ValueError: fewer than one round, or `shrinkage` is not between 0 and 1.
    """
    _check_rounds(rounds)
    _check_shrinkage(shrinkage)
    r, T = shrinkage, rounds
    total = sum(
        (r**T - r**tau) * power + ((1 - r) * (1 - r ** (T - tau)) + r**tau - r**T) * gap for tau in range(1, T)
    )
    return total / max(T - 1, 1)


def single_expert_error(rounds: int, power: float, gap: float, shrinkage: float) -> float:
    """Expected error G_T of one expert that hears T tasks, each drawn uniformly from the pool.

    The average over tau of the error after round T in `single_expert_forgetting`. The weights (1 - r) r^(T - tau) of the
    rounds add up to 1 - r^T, so leaving out each round's own takes away a share 1/T of the gap part:

        G_T = r^T A + (1 - r^T)(1 - 1/T) B.

    Args:
        rounds: T.
        power: A, see `mean_task_power`.
        gap: B, see `mean_task_gap`.
        shrinkage: r = 1 - samples / features.

    Returns:
        G_T.

    Raises:
        ValueError: fewer than one round, or `shrinkage` is not between 0 and 1.
    """
    _check_rounds(rounds)
    _check_shrinkage(shrinkage)
    unheard = shrinkage**rounds
    return unheard * power + (1 - unheard) * (1 - 1 / rounds) * gap


def _squared_gaps(weights_ND: Tensor) -> Tensor:
    return (weights_ND.unsqueeze(-2) - weights_ND.unsqueeze(-3)).square().sum(-1)


def _check_shrinkage(shrinkage: float) -> None:
    if not 0 < shrinkage < 1:
        raise ValueError(
            f"shrinkage={shrinkage}: expected 1 - samples / features, strictly between 0 and 1 (fewer samples than "
            "features)."
        )


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1.")
