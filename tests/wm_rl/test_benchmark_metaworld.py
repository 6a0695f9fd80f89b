"""The stale-replay benchmark on real Meta-World, small: resumable, reproducible, and its statistics."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from data.types import UserError
from sim.intervals import Interval
from sim.leaderboard import iqm, profile
from tests.examples import LEARNER
from wm_rl.commands.benchmark_metaworld import Round, benchmark_metaworld
from wm_rl.objectives import Gipo, PpoClip
from wm_rl.stale_metaworld import Contestant, Experiment, Regime, _episodes_to, train_stale
from wm_rl.state_policy import StatePolicyConfig

EXPERIMENT = Experiment(episodes_per_iteration=2, windows=4, decisions=8, discount=0.97, action_repeat=3,
                        max_episode_steps=12, policy=StatePolicyConfig(bins=5, width=16), last=2,
                        learner=dataclasses.replace(LEARNER, kl_coefficient=0.0))
REGIME = Regime(iterations=4, updates_per_iteration=2, capacity=4)
CONTESTANTS = {"PPO": Contestant(objective=PpoClip(epsilon=0.2)), "GIPO": Contestant(objective=Gipo(beta=0.5))}


@pytest.mark.sim
def test_a_run_is_reproducible_to_the_bit_and_as_stale_as_it_says(tmp_path):
    runs = [train_stale(EXPERIMENT, REGIME, CONTESTANTS["GIPO"], task="reach-v3", seed=3, scratch=tmp_path)
            for _ in range(2)]
    assert runs[0] == runs[1]
    assert list(tmp_path.iterdir()) == []
    assert len(runs[0]["curve"]["return"]) == 4
    # in the last two iterations the four newest episodes are 0 to 3 updates old
    assert 0 <= runs[0]["lag"] <= 3
    assert runs[0]["buckets"]["lag_0_20"]["ppo_0.2/utilisation"] > 0
    other = train_stale(EXPERIMENT, REGIME, CONTESTANTS["GIPO"], task="reach-v3", seed=4, scratch=tmp_path)
    assert other["curve"] != runs[0]["curve"]


@pytest.mark.sim
@pytest.mark.slow
def test_the_benchmark_goes_on_and_reports(tmp_path, capsys):
    def run():
        return benchmark_metaworld(
            folder=str(tmp_path), tasks=["reach-v3"], seeds=[0, 1], experiment=EXPERIMENT, contestants=CONTESTANTS,
            rounds={"stale": Round(regime=REGIME, contestants=["PPO", "GIPO"])}, jobs=2)

    assert run() == 0
    cells = sorted((tmp_path / "cells").iterdir())
    assert len(cells) == 4
    first, stamps = json.loads((tmp_path / "results.json").read_text()), [cell.stat().st_mtime_ns for cell in cells]
    cells[0].unlink()
    shutil.copy(tmp_path / "results.json", tmp_path / "before.json")
    assert run() == 0
    assert json.loads((tmp_path / "results.json").read_text()) == first  # the missing cell came out the same
    assert [cell.stat().st_mtime_ns for cell in cells[1:]] == stamps[1:]
    (rows,) = [board["rows"] for board in first]
    assert rows[0]["against_first"] is None
    assert rows[1]["pairs"] == 2
    page = (tmp_path / "report.html").read_text()
    assert "GIPO" in page
    assert page.count("data:image/png") == 1
    assert "of 2" in capsys.readouterr().out


def test_unknown_contestants_are_named(tmp_path):
    with pytest.raises(UserError, match=r"rounds\.stale: unknown contestant 'GIPPO'; there are PPO, GIPO"):
        benchmark_metaworld(folder=str(tmp_path), tasks=["reach-v3"], seeds=[0], experiment=EXPERIMENT,
                            contestants=CONTESTANTS, jobs=1,
                            rounds={"stale": Round(regime=REGIME, contestants=["GIPPO"])})


def test_interquartile_mean_by_hand():
    # of 0 … 7 the middle half is 2, 3, 4, 5
    scores = np.arange(8.0).reshape(4, 2)
    found = iqm(scores)
    assert found.estimate == 3.5
    assert found.low < 3.5 < found.high
    assert iqm(np.full((5, 3), 0.25)) == Interval(estimate=0.25, low=0.25, high=0.25)
    assert iqm(scores) == found


def test_interquartile_mean_does_not_depend_on_who_drew_before_it():
    scores = np.random.default_rng(0).random((5, 3))
    np.random.seed(1)  # rliable draws from this one
    found = iqm(scores)
    after = np.random.random()
    np.random.seed(1)
    assert np.random.random() == after
    assert iqm(scores) == found
    assert iqm(scores, seed=1) != found


def test_profile_counts_runs_above():
    assert profile(np.array([[0.1, 0.5], [0.9, 0.5]]), np.array([0.0, 0.5, 0.95])).tolist() == [1.0, 0.25, 0.0]


def test_episodes_to_a_level():
    assert _episodes_to(0.8, [0, 0, 1, 1, 1, 1, 1, 0], rows=4) == 24  # 0, 1, 1, 1, 1 ends with the sixth
    assert _episodes_to(0.8, [0.0] * 10, rows=4) is None
