from dataclasses import replace

import numpy as np
import pytest
import torch

from data.rollout import rollout
from data.store import ReplayStore
from data.types import Action, Env, Source, Success, UserError
from tests.world_model.conftest import SPEC, STATISTICS, episode
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner


@pytest.fixture(scope="module")
def learner(store):
    config = WorldModelConfig(widths=(16, 24), batch=4)
    made = WorldModelLearner(config, spec=store.spec, statistics=store.statistics, seed=0)
    made.fit(store, 3)
    return made


def imagine(learner, store, n=3, **knobs):
    return learner.imagination(store, ImaginationConfig(micro_batch=4, **knobs), num_envs=n)


def reset(env, seeds, mask=None):
    mask = np.ones(env.num_envs, bool) if mask is None else np.array(mask)
    return env.reset(seed=seeds, options={"reset_mask": mask})


def fix_probability(env, values):
    """Make the success model say ``values[row](age)``."""
    env._judge = lambda part: np.array([values[row](env._age[row]) for row in part.rows], float)


def test_it_is_an_env_and_says_what_it_is(learner, store):
    env = imagine(learner, store)
    assert isinstance(env, Env)
    assert env.source is Source.IMAGINED
    assert (env.world_model_version, env.max_episode_steps) == (1, 8)
    observation, info = reset(env, [1, 2, 3])
    assert observation["frames"]["front"].shape == (3, 32, 32, 3)
    assert observation["frames"]["front"].dtype == np.uint8
    assert observation["proprio"].dtype == np.float32
    for name in ("instruction", "task", "success", "uncertainty", "time", "branch"):
        assert len(info[name]) == 3


def test_an_episode_starts_at_a_recorded_observation(learner, store):
    env = imagine(learner, store)
    observation, info = reset(env, [11, 12, 13])
    for row, seed in enumerate([11, 12, 13]):
        branch = env.branch(seed)
        recorded = store.column(branch.episode, "rgb_front")[branch.step]
        assert np.array_equal(observation["frames"]["front"][row], recorded)
        assert np.array_equal(observation["proprio"][row], store.column(branch.episode, "proprio")[branch.step])
        table = store.episodes
        found = (table.segment == info["branch"][row]["segment"]) & (table.row == info["branch"][row]["row"])
        assert np.flatnonzero(found).tolist() == [branch.episode]
        assert info["branch"][row]["step"] == branch.step


def test_branch_points_are_uniform_over_recorded_steps(learner, store):
    env = imagine(learner, store, n=1)
    branches = [env.branch(seed) for seed in range(4000)]
    lengths = np.array(store.episodes.length)
    assert all(branch.step < lengths[branch.episode] for branch in branches)
    counts = np.bincount([branch.episode for branch in branches], minlength=len(lengths))
    expected = 4000 * lengths / lengths.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 59 degrees of freedom, p = 1e-4


def test_starts_near_success_failure_and_beginning(learner, store):
    table = store.episodes
    won = set(np.flatnonzero(table.success == "yes"))
    near = imagine(learner, store, n=1, horizon=3, starts={"near_success": 1.0})
    for seed in range(300):
        branch = near.branch(seed)
        assert branch.episode in won
        assert 1 <= table.length[branch.episode] - branch.step <= 3
    failed = imagine(learner, store, n=1, starts={"failure": 1.0})
    assert {failed.branch(seed).episode for seed in range(2000)} == set(range(60)) - won
    first = imagine(learner, store, n=1, starts={"beginning": 1.0})
    assert [first.branch(seed).episode for seed in range(60)] == list(range(60))
    assert {first.branch(seed).step for seed in range(60)} == {0}
    mixed = imagine(learner, store, n=1, starts={"beginning": 1.0, "failure": 3.0})
    kinds = [mixed.branch(seed).provenance["start"] for seed in range(2000)]
    assert kinds.count("failure") / 2000 == pytest.approx(0.75, abs=0.04)  # 4 standard errors
    with pytest.raises(UserError, match=r"expected weights of uniform, beginning, near_success, failure, got"):
        ImaginationConfig(starts={"keyframes": 1.0})


def test_uncertain_episodes_are_cut_short(learner, store):
    free, gated = (imagine(learner, store, horizon=6, max_uncertainty=limit) for limit in (None, 1e-6))
    for env, steps in ((free, 6), (gated, 1)):
        fix_probability(env, [lambda age: 0.1] * 3)
        reset(env, [1, 2, 3])
        ended = [env.step(np.zeros((3, 2), np.float32))[3].all() for _ in range(steps)]
        assert ended == [False] * (steps - 1) + [True]


def test_only_the_newest_of_the_chosen_source(learner, store):
    env = imagine(learner, store, n=1, sources=("real",), newest=5)
    assert {env.branch(seed).episode for seed in range(200)} == set(range(55, 60))


def test_a_seed_decides_the_episode_whatever_its_row_and_neighbours(learner, store):
    rng = np.random.default_rng(0)
    plan = rng.uniform(-1, 1, (8, 2)).astype(np.float32)

    def play(n, row, seeds):
        env = imagine(learner, store, n=n)
        reset(env, seeds)
        return [env.step(np.tile(plan[i], (n, 1))) for i in range(5)], row

    alone, _ = play(1, 0, [7])
    crowd, row = play(6, 4, [1, 2, 3, 4, 7, 5])
    for a, b in zip(alone, crowd, strict=True):
        assert np.array_equal(a[0]["frames"]["front"][0], b[0]["frames"]["front"][row])
        assert np.array_equal(a[0]["proprio"][0], b[0]["proprio"][row])
        assert a[1][0] == b[1][row]
        assert a[4]["uncertainty"][0] == b[4]["uncertainty"][row]


def test_only_masked_rows_restart(learner, store):
    env = imagine(learner, store)
    reset(env, [1, 2, 3])
    env.step(np.zeros((3, 2), np.float32))
    before = env.step(np.zeros((3, 2), np.float32))[0]
    after, info = reset(env, [None, 5, None], [False, True, False])
    assert np.array_equal(before["frames"]["front"][[0, 2]], after["frames"]["front"][[0, 2]])
    assert info["time"].tolist() == pytest.approx([0.2, 0.0, 0.2])
    assert info["uncertainty"][1] == 0
    with pytest.raises(ValueError, match="expected a seed for row 1"):
        reset(env, [1, None, 1])


def test_truncation_at_the_horizon_then_parked(learner, store):
    env = imagine(learner, store, horizon=3)
    fix_probability(env, [lambda age: 0.1 * age] * 3)
    reset(env, [1, 2, 3])
    for step in range(3):
        observation, reward, terminated, truncated, info = env.step(np.zeros((3, 2), np.float32))
        assert reward == pytest.approx([0.1] * 3)
        assert truncated.tolist() == [step == 2] * 3
        assert not terminated.any()
    assert (np.diff(info["uncertainty"]) != 0).any()
    again, reward, terminated, truncated, later = env.step(np.ones((3, 2), np.float32))
    assert np.array_equal(again["frames"]["front"], observation["frames"]["front"])
    assert np.array_equal(again["proprio"], observation["proprio"])
    assert (reward.tolist(), truncated.tolist()) == ([0, 0, 0], [True] * 3)
    assert np.array_equal(later["uncertainty"], info["uncertainty"])


def test_success_needs_consecutive_frames(learner, store):
    env = imagine(learner, store, horizon=6, success_frames=2, success_threshold=0.9)
    flicker, steady = {1: 0.95, 2: 0.5, 3: 0.95, 4: 0.95}, {1: 0.2, 2: 0.91, 3: 0.92, 4: 0.1}
    values = [lambda age: flicker.get(int(age), 0.0), lambda age: steady.get(int(age), 0.0), lambda age: 0.0]
    fix_probability(env, values)
    reset(env, [1, 2, 3])
    ended = [env.step(np.zeros((3, 2), np.float32))[2].tolist() for _ in range(5)]
    assert ended[1] == [False, False, False]
    assert [row[1] for row in ended].index(True) == 2
    assert [row[0] for row in ended].index(True) == 3
    assert not any(row[2] for row in ended)


def test_earlier_results_are_the_callers_to_keep(learner, store):
    env = imagine(learner, store)
    observation, info = reset(env, [1, 2, 3])
    frames, uncertainty = observation["frames"]["front"].copy(), info["uncertainty"].copy()
    env.step(np.ones((3, 2), np.float32))
    assert np.array_equal(observation["frames"]["front"], frames)
    assert np.array_equal(info["uncertainty"], uncertainty)


class Still:
    chunk, version = 2, 4

    def act(self, observation, seeds):
        n = len(observation.slot)
        shape = (n, 2, 2)
        return Action(token=np.zeros(shape, np.int16), action=np.zeros(shape, np.float32),
                      log_prob=np.full(shape, -1, np.float32), value=np.zeros(n, np.float32))


def test_rollouts_can_be_recorded(learner, store):
    env = imagine(learner, store)
    trajectories = list(rollout(env, Still(), [[1, 4], [2], []], sample=True))
    assert len(trajectories) == 3
    for trajectory in trajectories:
        assert trajectory.source is Source.IMAGINED
        assert trajectory.world_model_version == 1
        assert trajectory.success in (Success.YES, Success.NO)
        assert len(trajectory) <= 8
        assert (trajectory.uncertainty > 0).all()


def test_a_store_without_recorded_episodes_is_refused(learner, store, tmp_path):
    from data.store import ReplayStore

    empty = ReplayStore.create(tmp_path / "s", spec=store.spec, statistics=store.statistics, embodiment="square")
    with pytest.raises(UserError, match="collect or ingest some first"):
        imagine(learner, empty)
    with pytest.raises(UserError, match="expected some of sim and real"):
        ImaginationConfig(sources=("imagined",))


def test_two_rows_never_share_noise(learner, store):
    env = imagine(learner, store, n=2)
    reset(env, [1, 2])
    first, second = (torch.randn(4, generator=generator) for generator in env._generators)
    assert not torch.equal(first, second)


def test_a_confirmed_success_is_worth_the_rest_of_one(learner, store):
    env = imagine(learner, store, horizon=6, success_frames=1, success_threshold=0.5)
    values = [lambda age: {1: 0.3, 2: 0.6}.get(int(age), 0.1), lambda age: 0.1, lambda age: 0.1]
    fix_probability(env, values)
    reset(env, [1, 2, 3])
    first, second = (env.step(np.zeros((3, 2), np.float32)) for _ in range(2))
    assert first[1].tolist() == pytest.approx([0.2, 0.0, 0.0])
    assert second[1].tolist() == pytest.approx([0.7, 0.0, 0.0])  # from .3 to 1, not to .6
    assert second[2].tolist() == [True, False, False]


def test_no_branch_begins_after_a_success(learner, tmp_path):
    replay = ReplayStore.create(tmp_path / "s", spec=SPEC, statistics=STATISTICS, embodiment="square")
    for seed in range(8):
        t = episode(seed)
        step = np.arange(len(t))
        replay.append([replace(t, terminated=step == 2, truncated=step < 0, success=Success.YES)])
    for starts in ({"uniform": 1.0}, {"near_success": 1.0}, {"near_success": 1.0, "uniform": 1.0}):
        for horizon in (2, 9):
            env = imagine(learner, replay, n=1, horizon=horizon, starts=starts)
            steps = {env.branch(seed).step for seed in range(200)}
            assert steps == ({1, 2} if horizon == 2 and len(starts) == 1 and "near_success" in starts else {0, 1, 2})
