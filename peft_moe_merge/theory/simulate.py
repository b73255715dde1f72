"""Linear experts behind a linear gate learn a stream of regression tasks; many seeds are simulated side by side.

The setting is that of Li, Lin, Duan, Liang, Shroff, "Theory on Mixture-of-Experts in Continual Learning", ICLR 2025
(arXiv 2406.16437). Each round brings a data set of one of N tasks, one sample of which carries the task's signal; the
gate sends the whole round to one expert, which fits it exactly; the gate then makes one gradient step, until the stop
rule freezes it. Constants are our own choice, see `docs/theory.md`.

Shapes: S seeds, T rounds, N tasks, C clusters of similar tasks, M experts, D features, L samples a round.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from peft_moe_merge.tuners.moe_lora_merge.routing_stop import FlagRule, update_flags

Routing = Literal["gate", "task", "cluster"]
Signals = Literal["cluster", "task", "none"]


@dataclass(frozen=True)
class Setting:
    """One configuration of the simulation; symbols of the paper in parentheses.

    Attributes:
        experts: number of experts (M); 1 is the single-model baseline.
        tasks: number of tasks in the pool (N); each round draws one uniformly, so tasks recur.
        clusters: number of clusters of similar tasks (K); equal to `tasks` when no two tasks are alike.
        features: number of features (d).
        samples: samples a round (s), fewer than `features`.
        rounds: number of rounds (T).
        task_scale: standard deviation of the entries of a cluster's centre (sigma_0).
        cluster_spread: standard deviation of a task's entries around the centre of its cluster.
        sample_scale: standard deviation of the entries of samples without signal (sigma_t).
        signal_range: the signal's strength is uniform in this interval (beta).
        signals: orthonormal signal vectors (v): one for each "cluster" or each "task"; "none" leaves the signal out, so
            that all samples are Gaussian, the assumption under which the closed forms are exact.
        routing: "gate" learns; "task" and "cluster" are oracles that give each its own expert.
        step_size: learning rate of the gate (eta).
        locality: whether the gate learns from the locality loss.
        balance_weight: weight of the load-balance loss (alpha); 0 leaves it out.
        routing_noise: upper end of the uniform noise on the scores (lambda).
        stop: whether the stop rule may freeze the gate.
        explore: rounds before the stop rule looks (T_1); None means `ceil(experts / step_size)`.
        gap: threshold of the stop rule (Gamma).
        flag_rule: reading of the stop rule, see `peft_moe_merge.tuners.moe_lora_merge.routing_stop.gate_gap_flags`.

    Raises:
        ValueError: a value outside its range, or values that contradict each other.
    """

    experts: int = 5
    tasks: int = 6
    clusters: int = 3
    features: int = 10
    samples: int = 6
    rounds: int = 1000
    task_scale: float = 0.4
    cluster_spread: float = 0.05
    sample_scale: float = 0.01
    signal_range: tuple[float, float] = (0.5, 1.0)
    signals: Signals = "cluster"
    routing: Routing = "gate"
    step_size: float = 0.2
    locality: bool = True
    balance_weight: float = 0.5
    routing_noise: float = 0.003
    stop: bool = True
    explore: int | None = None
    gap: float = 0.32
    flag_rule: FlagRule = "lt"

    def __post_init__(self) -> None:
        for name in ("experts", "tasks", "clusters", "features", "samples", "rounds"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: expected at least 1.")
        for name in ("task_scale", "sample_scale", "step_size"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, f"{name}={value}: expected a positive number.")
        for name in ("cluster_spread", "balance_weight", "routing_noise", "gap"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}: expected zero or more.")
        for name, choices in (("signals", Signals), ("routing", Routing), ("flag_rule", FlagRule)):
            value = getattr(self, name)
            _require(value in get_args(choices), f"{name}={value!r}: expected one of {get_args(choices)}.")
        _require(
            self.samples < self.features,
            f"samples={self.samples} with features={self.features}: the theory is of overparameterised experts, which "
            "can fit any round exactly. Use fewer samples than features.",
        )
        _require(self.clusters <= self.tasks, f"clusters={self.clusters}: more than the {self.tasks} tasks.")
        _require(
            self.signal_count <= self.features,
            f"signals={self.signals!r} needs {self.signal_count} orthonormal vectors, but features={self.features}.",
        )
        low, high = self.signal_range
        _require(0 < low <= high, f"signal_range={self.signal_range}: expected 0 < low <= high.")
        needed = {"gate": 1, "task": self.tasks, "cluster": self.clusters}[self.routing]
        _require(
            self.experts >= needed,
            f"routing={self.routing!r} gives each {self.routing} an expert of its own: experts={self.experts}, "
            f"expected at least {needed}.",
        )
        if self.stop and self.routing == "gate":
            _require(
                0 <= self.exploration_rounds <= self.rounds,
                f"exploration takes {self.exploration_rounds} rounds, which is not within rounds={self.rounds}. Set "
                "explore to fewer rounds, raise rounds, or set stop=False for a gate that never stops.",
            )

    @property
    def exploration_rounds(self) -> int:
        """Rounds before the stop rule looks (T_1)."""
        return math.ceil(self.experts / self.step_size) if self.explore is None else self.explore

    @property
    def signal_count(self) -> int:
        """Number of different signal vectors."""
        return self.tasks if self.signals == "task" else self.clusters

    @property
    def shrinkage(self) -> float:
        """r = 1 - s/d: the share of an expert's squared error that a round of data leaves untouched."""
        return 1 - self.samples / self.features

    @property
    def cluster_of_task(self) -> Tensor:
        """Cluster of each task, `[N]`."""
        return torch.arange(self.tasks) % self.clusters


@dataclass(frozen=True)
class Stream:
    """What the learner meets. A seed's stream depends on nothing but the seed and the sizes of the data.

    Attributes:
        weights_SND: ground truth of each task (w).
        signals_SND: signal vector of each task (v).
        tasks_ST: task of each round.
        x_STDL: samples of each round, one a column.
        noise_STM: routing noise in [0, 1), drawn last, so that runs with other numbers of experts meet the same data.
    """

    weights_SND: Tensor
    signals_SND: Tensor
    tasks_ST: Tensor
    x_STDL: Tensor
    noise_STM: Tensor


@dataclass(frozen=True)
class Run:
    """What came out of a simulation.

    Attributes:
        setting: what was simulated.
        weights_SND: ground truth of each task.
        tasks_ST: task of each round.
        experts_ST: expert that was given each round.
        forgetting_ST: mean over earlier rounds of how much the error on the round's task grew since then, in the expert
            that heard it (F_t); 0 in the first round.
        error_ST: mean over the rounds so far of the squared distance between the round's task and the expert that heard
            it, as it is now (G_t).
        scores_STMN: noise-free gate score of each task's signal vector at the end of each round.
        frozen_at_S: number of the round, from 1, in which the gate stopped; 0 if it never did.
        gates_SMD: gate vectors at the end (theta).
        experts_SMD: experts' weights at the end (w).
    """

    setting: Setting
    weights_SND: Tensor
    tasks_ST: Tensor
    experts_ST: Tensor
    forgetting_ST: Tensor
    error_ST: Tensor
    scores_STMN: Tensor
    frozen_at_S: Tensor
    gates_SMD: Tensor
    experts_SMD: Tensor


def draw_stream(setting: Setting, seeds: Sequence[int]) -> Stream:
    """Draw tasks, signals, samples and routing noise, each seed from its own generator."""
    return Stream(*map(torch.stack, zip(*(_draw_seed(setting, seed) for seed in seeds), strict=True)))


def _draw_seed(setting: Setting, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    cluster_N = setting.cluster_of_task
    centres_CD = setting.task_scale * normal(setting.clusters, setting.features)
    weights_ND = centres_CD[cluster_N] + setting.cluster_spread * normal(setting.tasks, setting.features)
    basis_DK = torch.linalg.qr(normal(setting.features, setting.signal_count)).Q
    signals_ND = basis_DK.T[torch.arange(setting.tasks) if setting.signals == "task" else cluster_N]

    tasks_T = torch.randint(setting.tasks, (setting.rounds,), generator=generator)
    x_TDL = setting.sample_scale * normal(setting.rounds, setting.features, setting.samples)
    if setting.signals != "none":
        low, high = setting.signal_range
        strength_T1 = high - (high - low) * uniform(setting.rounds, 1)
        # Which column it is does not matter: fit and gate are blind to the order of the samples.
        x_TDL[:, :, 0] = strength_T1 * signals_ND[tasks_T]
    return weights_ND, signals_ND, tasks_T, x_TDL, uniform(setting.rounds, setting.experts)


def fit_expert(w_SD: Tensor, x_SDL: Tensor, y_SL: Tensor) -> Tensor:
    """Change linear experts as little as possible such that they fit their data exactly.

    `w + X (XᵀX)⁻¹ (y - Xᵀw)`, the point where gradient descent on the squared error ends.

    Args:
        w_SD: weights before.
        x_SDL: samples, one a column.
        y_SL: labels.

    Returns:
        Weights after, `[S, D]`, with `Xᵀw = y`.

    Raises:
        ValueError: the samples of a round are linearly dependent, so that its Gram matrix is singular.
    """
    # The result depends on the span of the samples only. Unit columns keep the Gram matrix of a strong signal sample and
    # faint others well conditioned.
    norms_SL = x_SDL.norm(dim=1)
    x_SDL = x_SDL / norms_SL.unsqueeze(1)
    y_SL = y_SL / norms_SL
    factor_SLL, failed_S = torch.linalg.cholesky_ex(x_SDL.mT @ x_SDL)
    pivots_SL = factor_SLL.diagonal(dim1=-2, dim2=-1)
    # Rounding lets a singular matrix pass Cholesky; its last pivots are then of the order of sqrt(epsilon).
    singular_S = (failed_S != 0) | ~(pivots_SL.amin(-1) > 10 * math.sqrt(torch.finfo(x_SDL.dtype).eps))
    if singular_S.any():
        where = singular_S.nonzero().flatten().tolist()
        raise ValueError(
            f"Singular Gram matrix at batch position {where}: the samples of that round are zero or linearly dependent, "
            "and no unique smallest change fits them. Draw samples in general position, fewer than features."
        )
    residual_SL1 = (y_SL - (x_SDL.mT @ w_SD.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)
    return w_SD + (x_SDL @ torch.cholesky_solve(residual_SL1, factor_SLL)).squeeze(-1)


def gate_gradient(probs_SM: Tensor, chosen_S: Tensor, cost_S: Tensor, xbar_SD: Tensor) -> Tensor:
    """Gradient with respect to the gate vectors of `cost · softmax(scores)[chosen]`, with `scores_m = theta_m · xbar`.

    Both gate losses have this form: locality with the distance the chosen expert moved as its cost, balance with
    `alpha M f / t`. The derivative of `p_c` by score m is `p_c (1{m = c} - p_m)`, and of score m by theta_m is xbar; so
    the chosen expert is pushed off the data, all others are drawn to it, and the sum over experts is zero.

    Args:
        probs_SM: softmax of the scores, without routing noise.
        chosen_S: expert that was given the round.
        cost_S: factor of the chosen expert's probability in the loss.
        xbar_SD: sum of the round's samples, the gate's input.

    Returns:
        Gradients `[S, M, D]`.
    """
    chosen_prob_S = probs_SM.gather(1, chosen_S.unsqueeze(1)).squeeze(1)
    direction_SM = one_hot(chosen_S, probs_SM.shape[1]) - probs_SM
    return ((cost_S * chosen_prob_S).unsqueeze(1) * direction_SM).unsqueeze(2) * xbar_SD.unsqueeze(1)


def simulate(setting: Setting, seeds: Sequence[int]) -> Run:
    """Run all rounds for all seeds.

    Args:
        setting: what to simulate.
        seeds: one run each; a seed's result does not depend on which others run beside it.

    Returns:
        The curves, the routing and the final state.

    Raises:
        ValueError: no seeds, or linearly dependent samples.
    """
    _require(len(seeds) > 0, "seeds is empty: expected at least one.")
    with _one_thread():
        return _play(setting, draw_stream(setting, seeds))


def _play(setting: Setting, stream: Stream) -> Run:
    S, M, N = len(stream.tasks_ST), setting.experts, setting.tasks
    every_S = torch.arange(S)
    owner_N = torch.arange(N) if setting.routing == "task" else setting.cluster_of_task

    experts_SMD = torch.zeros(S, M, setting.features, dtype=torch.float64)
    gates_SMD = torch.zeros_like(experts_SMD)
    flags_SM = torch.zeros(S, M, dtype=torch.bool)
    frozen_at_S = torch.zeros(S, dtype=torch.long)
    # Error of every expert on every task, and how often each expert heard each task: all that forgetting and error need.
    distance_SMN = stream.weights_SND.square().sum(-1).unsqueeze(1).repeat(1, M, 1)
    heard_SMN = torch.zeros_like(distance_SMN)
    first_error_S = torch.zeros(S, dtype=torch.float64)
    chosen_rounds, forgetting_rounds, error_rounds, score_rounds = [], [], [], []

    for t in range(1, setting.rounds + 1):
        task_S, x_SDL = stream.tasks_ST[:, t - 1], stream.x_STDL[:, t - 1]
        target_SD = stream.weights_SND[every_S, task_S]
        xbar_SD = x_SDL.sum(-1)
        scores_SM = (gates_SMD @ xbar_SD.unsqueeze(-1)).squeeze(-1)
        if setting.routing == "gate":
            chosen_S = (scores_SM + setting.routing_noise * stream.noise_STM[:, t - 1]).argmax(-1)
        else:
            chosen_S = owner_N[task_S]

        before_SD = experts_SMD[every_S, chosen_S]
        after_SD = fit_expert(before_SD, x_SDL, (x_SDL.mT @ target_SD.unsqueeze(-1)).squeeze(-1))
        experts_SMD[every_S, chosen_S] = after_SD
        distance_SMN[every_S, chosen_S] = (after_SD.unsqueeze(1) - stream.weights_SND).square().sum(-1)
        heard_SMN[every_S, chosen_S, task_S] += 1
        first_error_S = first_error_S + distance_SMN[every_S, chosen_S, task_S]

        if setting.routing == "gate":
            if setting.stop:
                flags_SM = update_flags(
                    flags_SM,
                    scores_SM,
                    chosen_S.unsqueeze(1),
                    step=t,
                    explore=setting.exploration_rounds,
                    gap=setting.gap,
                    rule=setting.flag_rule,
                )
                frozen_at_S[flags_SM.all(-1) & (frozen_at_S == 0)] = t
            load_S = heard_SMN[every_S, chosen_S].sum(-1) / t
            cost_S = setting.balance_weight * M * load_S / t
            if setting.locality:
                cost_S = cost_S + (after_SD - before_SD).norm(dim=-1)
            gradient_SMD = gate_gradient(scores_SM.softmax(-1), chosen_S, cost_S, xbar_SD)
            gates_SMD = torch.where(
                (frozen_at_S > 0)[:, None, None], gates_SMD, gates_SMD - setting.step_size * gradient_SMD
            )

        error_sum_S = (heard_SMN * distance_SMN).sum((1, 2))
        chosen_rounds.append(chosen_S)
        forgetting_rounds.append((error_sum_S - first_error_S) / max(t - 1, 1))
        error_rounds.append(error_sum_S / t)
        score_rounds.append(gates_SMD @ stream.signals_SND.mT)

    return Run(
        setting=setting,
        weights_SND=stream.weights_SND,
        tasks_ST=stream.tasks_ST,
        experts_ST=torch.stack(chosen_rounds, 1),
        forgetting_ST=torch.stack(forgetting_rounds, 1),
        error_ST=torch.stack(error_rounds, 1),
        scores_STMN=torch.stack(score_rounds, 1),
        frozen_at_S=frozen_at_S,
        gates_SMD=gates_SMD,
        experts_SMD=experts_SMD,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """A round is too little work to share: on busy cores, waiting for a second thread takes far longer than the round."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
