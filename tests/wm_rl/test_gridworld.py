"""The 2 x 2 grid: the published path to three digits, and enumeration against sampling and finite differences."""

import json

import numpy as np
import pytest

from tests.wm_rl.test_objectives import GIPO, NO_CLIP, PPO, SAPO
from wm_rl.commands.benchmark_gridworld import GridPath, benchmark_gridworld
from wm_rl.gridworld import ACTIONS, DISCOUNT, GOAL, STATES, analyse, divergence, evaluate, path, random_pair, softmax
from wm_rl.objectives import Gipo

POLICIES = path(60, 0.5)
TARGET = POLICIES[60]


@pytest.mark.parametrize(("objective", "bias", "variance", "cosine", "one", "many"), [
    (PPO, 0.0617, 0.0, 0.0, 0.00381, 0.00381), (SAPO, 0.0133, 0.0165, 0.999, 0.0167, 0.00021),
    (NO_CLIP, 0.0, 0.0242, 1.0, 0.0242, 0.00005), (GIPO, 0.0605, 0.0006, 0.73, 0.00426, 0.00366),
    (Gipo(beta=1.0), 0.0476, 0.0026, 0.982, 0.00487, 0.00227), (Gipo(beta=2.0), 0.0202, 0.0114, 0.998, 0.0118, 0.00043),
    (Gipo(beta=5.0), 0.0039, 0.0213, 1.0, 0.0213, 0.00006)], ids=repr)
def test_lag_60_agrees_with_an_independent_computation(objective, bias, variance, cosine, one, many):
    found = analyse(objective, TARGET, POLICIES[0])
    assert found.bias == pytest.approx(bias, abs=5e-5)
    assert found.variance == pytest.approx(variance, abs=6e-5)
    assert found.cosine == pytest.approx(cosine, abs=5e-3)
    assert found.mean_squared_error(1) == pytest.approx(one, abs=6e-5)
    assert found.mean_squared_error(512) == pytest.approx(many, abs=6e-6)


def test_ppo_collapses_at_lag_41():
    used = [analyse(PPO, TARGET, POLICIES[60 - lag]).utilisation for lag in range(61)]
    assert [round(used[lag], 2) for lag in (8, 16, 40)] == [1.0, 0.86, 0.41]
    assert used[41:] == [0.0] * 20
    assert divergence(TARGET, POLICIES[0]) == pytest.approx(0.815, abs=1e-3)


def test_the_path_climbs_the_true_gradient():
    # finite differences of the discounted return from the start, for any state distribution that is the occupancy
    logits = np.log(POLICIES[7])

    def value(flat):
        policy = softmax(flat.reshape(STATES, ACTIONS))
        # first-visit algebra by simulation of expectations: iterate the Bellman equation to convergence
        v = np.zeros(STATES)
        for _ in range(400):
            following = [[v[_next(s, a)] for a in range(ACTIONS)] for s in range(STATES)]
            v = -1 + DISCOUNT * (policy * np.array(following)).sum(axis=1)
            v[GOAL] = 0
        return v[0]

    flat, h = logits.reshape(-1), 1e-5
    slope = np.array([(value(flat + h * e) - value(flat - h * e)) / (2 * h) for e in np.eye(len(flat))])
    advantage, share = evaluate(POLICIES[7])
    ours = (share[:, None] * POLICIES[7] * advantage).reshape(-1)
    # the share is the occupancy up to a factor
    np.testing.assert_allclose(ours / np.linalg.norm(ours), slope / np.linalg.norm(slope), atol=1e-6)


def _next(state, action):
    row, column = divmod(state, 2)
    row = min(max(row + (-1, 1, 0, 0)[action], 0), 1)
    column = min(max(column + (0, 0, -1, 1)[action], 0), 1)
    return GOAL if state == GOAL else row * 2 + column


def test_enumeration_agrees_with_sampling():
    rng = np.random.default_rng(0)
    target, behaviour = random_pair(rng, 0.5)
    advantage, share = evaluate(target)
    states = rng.choice(STATES, 200_000, p=share)
    actions = (behaviour[states].cumsum(axis=1) < rng.random((len(states), 1))).sum(axis=1)
    ratio = target[states, actions] / behaviour[states, actions]
    weight = np.exp(-0.5 * (np.log(ratio) / 0.5) ** 2) * ratio * advantage[states, actions]
    estimate = np.zeros((len(states), STATES, ACTIONS))
    estimate[np.arange(len(states)), states] = weight[:, None] * (np.eye(ACTIONS)[actions] - target[states])
    expected = estimate.mean(axis=0)
    found = analyse(GIPO, target, behaviour)
    true = share[:, None] * target * advantage
    assert found.bias == pytest.approx(np.linalg.norm(expected - true), rel=0.03)
    assert found.variance == pytest.approx(estimate.var(axis=0).sum(), rel=0.03)


def test_the_command_writes_tables_and_a_plot(tmp_path, capsys):
    grid = GridPath(target_step=60, rate=0.5, lags=[41, 60])
    benchmark_gridworld(folder=str(tmp_path), path=grid, objectives={"PPO": PPO, "GIPO": GIPO}, batches=[1, 512],
                        random_pairs=20, random_distance=1.0, seed=0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["collapse"] == 41
    assert results["true_gradient"] == pytest.approx(0.0617, abs=5e-5)
    assert results["random_pairs"]["PPO"]["unused"] == 0
    assert (tmp_path / "gridworld.png").stat().st_size > 10_000
    assert "lag 60" in capsys.readouterr().out
