import math

import pytest
import torch

from peft_moe_merge.theory.simulate import Setting, draw_stream, fit_expert, gate_gradient, simulate

S, M, N = 20, (1, 5, 10, 20), 6


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def play_slowly(setting: Setting, seed: int) -> dict:
    """One seed as the definitions read: losses through autograd, curves from snapshots of all experts."""
    stream = draw_stream(setting, [seed])
    truth, tasks = stream.weights_SND[0], stream.tasks_ST[0].tolist()
    experts = [torch.zeros(setting.features, dtype=torch.float64) for _ in range(setting.experts)]
    theta = torch.zeros(setting.experts, setting.features, dtype=torch.float64)
    chosen, snapshots, gates, forgetting, error = [], [], [], [], []
    past_prob = torch.zeros(setting.experts, dtype=torch.float64)
    settled, stopped = set(), False
    for t, task in enumerate(tasks, start=1):
        x = stream.x_STDL[0, t - 1]
        y = x.T @ truth[task]
        theta.requires_grad_()
        scores = torch.stack([sum(theta[m] @ x[:, i] for i in range(setting.samples)) for m in range(setting.experts)])
        noisy = scores.detach() + setting.routing_noise * stream.noise_STM[0, t - 1]
        winner = max(range(setting.experts), key=lambda m: noisy[m])
        chosen.append(winner)
        before = experts[winner]
        step = torch.linalg.lstsq(x.T, (y - x.T @ before).unsqueeze(1), driver="gelsd").solution.squeeze(1)
        experts[winner] = before + step
        snapshots.append(list(experts))

        if setting.stop and t > setting.exploration_rounds:
            for m in range(setting.experts):
                distance = abs(scores[m] - scores[winner]).item()
                if distance < setting.gap if setting.flag_rule == "lt" else distance > setting.gap:
                    settled.add(m)
            stopped = stopped or len(settled) == setting.experts
        probs = torch.softmax(scores, 0)
        share = torch.tensor([chosen.count(m) / t for m in range(setting.experts)], dtype=torch.float64)
        only = torch.nn.functional.one_hot(torch.tensor(winner), setting.experts)
        mean_prob = (past_prob + probs * only) / t
        loss = setting.balance_weight * setting.experts * (share * mean_prob).sum()
        if setting.locality:
            loss = loss + probs[winner] * step.norm()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = theta.detach() if stopped else theta.detach() - setting.step_size * gradient
        past_prob = past_prob + probs.detach() * only
        gates.append(theta.clone())

        def off(at: int, tau: int) -> float:
            return (snapshots[at][chosen[tau]] - truth[tasks[tau]]).square().sum().item()

        error.append(sum(off(t - 1, tau) for tau in range(t)) / t)
        grown = sum(off(t - 1, tau) - off(tau, tau) for tau in range(t - 1))
        forgetting.append(grown / (t - 1) if t > 1 else 0.0)
    return {"chosen": chosen, "forgetting": forgetting, "error": error, "gates": gates, "experts": experts}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stop": False},
        {"flag_rule": "gt", "gap": 0.01},
        {"gap": 0.01, "explore": 12},
        {"experts": 7, "tasks": 5, "clusters": 5, "features": 8, "samples": 3, "signals": "task", "explore": 5},
        {"balance_weight": 0.0, "routing_noise": 0.0},
        {"locality": False},
        {"experts": 1, "stop": False},
    ],
)
def test_simulation_matches_a_slow_reading_of_the_definitions(changes):
    setting = Setting(**{"experts": 4, "rounds": 40, "explore": 15} | changes)
    seeds = [3, 11]
    run = simulate(setting, seeds)
    for row, seed in enumerate(seeds):
        slow = play_slowly(setting, seed)
        assert run.experts_ST[row].tolist() == slow["chosen"]
        for name in ("forgetting", "error"):
            torch.testing.assert_close(getattr(run, f"{name}_ST")[row], torch.tensor(slow[name], dtype=torch.float64))
        torch.testing.assert_close(run.gates_SMD[row], slow["gates"][-1])
        torch.testing.assert_close(run.experts_SMD[row], torch.stack(slow["experts"]))
        signals = draw_stream(setting, [seed]).signals_SND[0]
        for t, gates in enumerate(slow["gates"]):
            torch.testing.assert_close(run.scores_STMN[row, t], gates @ signals.T)


def test_gate_gradient_is_autograds():
    theta, xbar, cost = normal(3, 5, 4).requires_grad_(), normal(3, 4, seed=1), normal(3, seed=2).abs()
    chosen = torch.tensor([0, 4, 2])
    scores = (theta @ xbar.unsqueeze(-1)).squeeze(-1)
    loss = (cost * scores.softmax(-1).gather(1, chosen.unsqueeze(1)).squeeze(1)).sum()
    (expected,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(gate_gradient(scores.detach().softmax(-1), chosen, cost, xbar), expected)


def test_fit_is_exact_and_moves_as_little_as_possible():
    w, x, target = normal(8, 10), normal(8, 10, 6, seed=1), normal(8, 10, seed=2)
    y = (x.mT @ target.unsqueeze(-1)).squeeze(-1)
    fitted = fit_expert(w, x, y)
    torch.testing.assert_close((x.mT @ fitted.unsqueeze(-1)).squeeze(-1), y)
    shortest = torch.linalg.lstsq(
        x.mT, (y - (x.mT @ w.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1), driver="gelsd"
    ).solution
    torch.testing.assert_close(fitted - w, shortest.squeeze(-1))


def test_an_expert_that_already_fits_does_not_move():
    x, y = normal(4, 10, 6, seed=1), normal(4, 6, seed=2)
    once = fit_expert(normal(4, 10), x, y)
    assert (fit_expert(once, x, y) - once).norm(dim=-1).max() < 1e-12


def test_fit_is_blind_to_the_scale_of_samples():
    w, x, target = normal(4, 10), normal(4, 10, 6, seed=1), normal(4, 10, seed=2)
    scaled = x * torch.tensor([1.0, 1e-6, 1e-6, 1e3, 1e-6, 1.0])
    label = lambda x: (x.mT @ target.unsqueeze(-1)).squeeze(-1)  # noqa: E731
    torch.testing.assert_close(fit_expert(w, scaled, label(scaled)), fit_expert(w, x, label(x)))


@pytest.mark.parametrize("broken", ["copy", "scaled copy", "zero", "sum"])
def test_linearly_dependent_samples_are_refused_by_position(broken):
    x = normal(3, 10, 6)
    x[1, :, 5] = {
        "copy": x[1, :, 0],
        "scaled copy": -3.7 * x[1, :, 2],
        "zero": 0 * x[1, :, 0],
        "sum": x[1, :, :5].sum(-1),
    }[broken]
    with pytest.raises(ValueError, match=r"Singular Gram matrix at batch position \[1\]"):
        fit_expert(normal(3, 10), x, normal(3, 6))


@pytest.fixture(scope="module")
def section():
    """Twenty seeds, a thousand rounds: one expert, and three numbers of experts with and without stopping."""
    settings = [Setting(experts=1, stop=False)] + [Setting(experts=m, stop=s) for m in M[1:] for s in (True, False)]
    return {(s.experts, s.stop): simulate(s, range(S)) for s in settings}


def test_gate_vectors_sum_to_zero(section):
    for (experts, _), run in section.items():
        assert run.gates_SMD.sum(1).abs().max() < 1e-12
        assert run.scores_STMN.sum(2).abs().max() < 1e-12
        assert (run.gates_SMD.abs().max() > 1e-3) == (experts > 1)


def test_a_stopped_gate_never_changes_again_while_experts_learn_on(section):
    for experts in M[1:]:
        run = section[experts, True]
        assert (run.frozen_at_S == run.setting.exploration_rounds + 1).all()
        for scores_TMN, stop in zip(run.scores_STMN, run.frozen_at_S.tolist(), strict=True):
            assert torch.equal(scores_TMN[stop - 1 :], scores_TMN[stop - 2].expand_as(scores_TMN[stop - 1 :]))
            assert not torch.equal(scores_TMN[stop - 2], scores_TMN[stop - 3])
        assert (run.error_ST.diff(dim=1)[:, -100:] != 0).all()


def test_an_endless_gate_never_rests(section):
    for experts in M[1:]:
        run = section[experts, False]
        assert (run.frozen_at_S == 0).all()
        assert (run.scores_STMN.diff(dim=1).abs().amax((2, 3)) > 0).all()


# Means over twenty seeds of an independent implementation of the same setting: forgetting and error by round.
ELSEWHERE = {
    (1, False): ({100: 1.23, 250: 1.52, 500: 1.36, 1000: 1.21}, {100: 2.11, 1000: 2.13}),
    (5, True): ({100: 0.47, 250: 0.45, 500: 0.30, 1000: 0.29}, {100: 0.95, 1000: 0.53}),
    (5, False): ({100: 1.09, 250: 1.10, 500: 1.04, 1000: 1.13}, {100: 2.17, 1000: 2.23}),
    (10, True): ({100: 0.73, 250: 0.46, 500: 0.40, 1000: 0.39}, {100: 1.43, 1000: 0.69}),
    (10, False): ({100: 1.08, 250: 1.13, 500: 1.08, 1000: 1.13}, {100: 2.15, 1000: 2.27}),
    (20, True): ({100: 1.08, 250: 0.59, 500: 0.46, 1000: 0.40}, {100: 2.10, 1000: 0.74}),
    (20, False): ({100: 1.08, 250: 1.08, 500: 1.08, 1000: 1.10}, {100: 2.10, 1000: 2.25}),
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_curves_agree_with_an_independent_implementation(section, key):
    run = section[key]
    for curve_ST, elsewhere in zip((run.forgetting_ST, run.error_ST), ELSEWHERE[key], strict=True):
        for t, mean in elsewhere.items():
            values_S = curve_ST[:, t - 1]
            # The other mean has an error of its own, as large as ours: 95 % of differences lie within sqrt(2) half-widths.
            half = 2.09 * values_S.std() / math.sqrt(S) * math.sqrt(2)
            assert abs(values_S.mean() - mean) < half, (t, values_S.mean(), half)


def test_stopping_is_what_makes_experts_worth_having(section):
    single = section[1, False].error_ST[:, -1].mean()
    for experts in M[1:]:
        assert section[experts, True].error_ST[:, -1].mean() < 0.5 * single
        assert section[experts, False].error_ST[:, -1].mean() > 0.9 * single
    early = [section[m, True].error_ST[:, 99].mean().item() for m in M[1:]]
    assert early == sorted(early)


def test_same_seed_same_result_whoever_runs_beside_it():
    setting = Setting(rounds=80)
    together, alone = simulate(setting, [5, 6, 7]), simulate(setting, [6])
    for name in ("experts_ST", "forgetting_ST", "error_ST", "gates_SMD", "scores_STMN", "experts_SMD", "tasks_ST"):
        torch.testing.assert_close(getattr(together, name)[1:2], getattr(alone, name), rtol=0, atol=1e-12)
    assert not torch.equal(together.tasks_ST[0], together.tasks_ST[2])


def test_streams_are_the_same_for_any_number_of_experts_and_any_gate():
    one, many = draw_stream(Setting(experts=1), [4]), draw_stream(Setting(experts=20, routing_noise=0.1), [4])
    for name in ("weights_SND", "signals_SND", "tasks_ST", "x_STDL"):
        assert torch.equal(getattr(one, name), getattr(many, name))


def test_a_round_carries_its_tasks_signal_in_one_sample_and_faint_noise_in_the_others():
    setting = Setting(rounds=400, signal_range=(0.5, 0.8), sample_scale=0.01)
    stream = draw_stream(setting, [0])
    along_TL = torch.einsum("tdl,td->tl", stream.x_STDL[0], stream.signals_SND[0][stream.tasks_ST[0]])
    strong_TL = along_TL > 0.1
    assert (strong_TL.sum(1) == 1).all()
    strength = along_TL[strong_TL]
    assert 0.5 < strength.min() < 0.51 and 0.79 < strength.max() <= 0.8
    signal_TD = stream.x_STDL[0].mT[strong_TL]
    torch.testing.assert_close(signal_TD.norm(dim=-1), strength)
    faint = stream.x_STDL[0].mT[~strong_TL]
    assert faint.std().item() == pytest.approx(0.01, rel=0.03)


def test_tasks_of_a_cluster_are_alike_and_signals_are_orthonormal():
    stream = draw_stream(Setting(rounds=1, explore=0), range(500))
    w, v = stream.weights_SND, stream.signals_SND
    near, far = (w[:, 0] - w[:, 3]).square().mean(), (w[:, 0] - w[:, 1]).square().mean()
    assert near.item() == pytest.approx(2 * 0.05**2, rel=0.1)
    assert far.item() == pytest.approx(2 * (0.4**2 + 0.05**2), rel=0.1)
    same = torch.arange(N).remainder(3).unsqueeze(0) == torch.arange(N).remainder(3).unsqueeze(1)
    torch.testing.assert_close(v @ v.mT, same.double().expand(500, N, N), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["task", "cluster"])
def test_an_oracle_gives_each_its_own_expert_and_learns_it(kind):
    run = simulate(Setting(experts=6, routing=kind, cluster_spread=0.0, rounds=300), range(5))
    owner_ST = run.tasks_ST if kind == "task" else run.tasks_ST % 3
    assert torch.equal(run.experts_ST, owner_ST)
    assert run.error_ST[:, -1].max() < 1e-6
    assert (run.frozen_at_S == 0).all() and (run.gates_SMD == 0).all()


def test_without_noise_routing_follows_the_scores_alone():
    run = simulate(Setting(rounds=60, routing_noise=0.0), range(10))
    assert (run.experts_ST[:, 0] == 0).all()  # all scores are zero, and ties go to the lowest index
    noisy = simulate(Setting(rounds=60, routing_noise=0.3), range(10))
    assert len(noisy.experts_ST[:, 0].unique()) > 1


def test_exploration_lasts_experts_over_step_size_unless_told():
    assert Setting(experts=5, step_size=0.2).exploration_rounds == 25
    assert Setting(experts=5, step_size=0.3).exploration_rounds == 17
    assert Setting(experts=5, explore=3).exploration_rounds == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 10}, "samples=10 with features=10.*fewer samples than features"),
        ({"samples": 12}, "samples=12"),
        ({"samples": 0}, "samples=0: expected at least 1"),
        ({"experts": 0}, "experts=0: expected at least 1"),
        ({"rounds": 0}, "rounds=0"),
        ({"explore": 1001}, "exploration takes 1001 rounds.*rounds=1000.*stop=False"),
        ({"explore": -1}, "exploration takes -1"),
        ({"experts": 20, "rounds": 99}, "exploration takes 100 rounds"),
        ({"step_size": 0.0}, "step_size=0.0: expected a positive"),
        ({"sample_scale": float("nan")}, "sample_scale=nan"),
        ({"routing_noise": -0.1}, "routing_noise=-0.1"),
        ({"gap": -1.0}, "gap=-1.0"),
        ({"clusters": 7}, "clusters=7: more than the 6 tasks"),
        ({"tasks": 11, "signals": "task"}, "11 orthonormal vectors.*features=10"),
        ({"signal_range": (1.0, 0.5)}, "signal_range"),
        ({"flag_rule": "le"}, "flag_rule='le'"),
        ({"routing": "oracle"}, "routing='oracle'.*'gate', 'task', 'cluster'"),
        ({"routing": "task", "experts": 5}, "experts=5, expected at least 6"),
    ],
)
def test_bad_settings_name_the_value_and_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        Setting(**changes)


def test_exploration_may_exceed_the_rounds_of_a_gate_that_never_stops():
    assert Setting(experts=20, rounds=10, stop=False).exploration_rounds == 100


def test_no_seeds_is_an_error():
    with pytest.raises(ValueError, match="seeds is empty"):
        simulate(Setting(), [])


def test_threads_are_the_callers_again_afterwards_even_when_it_fails():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        simulate(Setting(rounds=30), [0])
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="Singular"):
            simulate(Setting(rounds=30, sample_scale=1e-320), [0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
