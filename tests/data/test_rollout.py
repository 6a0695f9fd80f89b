from __future__ import annotations

import numpy as np
import pytest

from data.rollout import decision_seed, rollout
from data.types import Action, Behaviour, Source, Spec, Statistics, Success


class CountingEnv:
    """An episode of seed ``s`` lasts ``2 + s % 3`` steps and succeeds when ``s`` is even; its frame shows the step."""

    spec = Spec(cameras=("eye",), image_size=4, proprio_names=("seed", "step"), action_names=("x",), control_hz=2.0)
    statistics = Statistics.from_dict(
        {"action_low": [-1.0], "action_high": [1.0], "proprio_mean": [0.0, 0.0], "proprio_std": [1.0, 1.0]})
    source, embodiment, world_model_version = Source.SIM, "counter", -1
    max_episode_steps, metadata, provenance = 4, {"autoreset_mode": "disabled"}, {"simulator": "counter"}

    def __init__(self, num_envs):
        self.num_envs = num_envs
        self.seed, self.count = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.over = np.ones(num_envs, bool)
        self.received = []

    def reset(self, *, seed, options):
        for row in np.flatnonzero(options["reset_mask"]):
            self.seed[row], self.count[row], self.over[row] = seed[row], 0, False
        return self._look()

    def step(self, actions):
        self.received.append(actions.copy())
        playing = ~self.over
        self.count[playing] += 1
        self.over |= self.count >= 2 + self.seed % 3
        ended = self.over & (self.seed % 2 == 0)
        observation, info = self._look()
        return observation, (ended & playing).astype(np.float32), ended, self.over & ~ended, info

    def close(self):
        pass

    def _look(self):
        frames = np.broadcast_to(self.count[:, None, None, None], (self.num_envs, 4, 4, 3)).astype(np.uint8)
        n = self.num_envs
        info = {"instruction": [f"count {seed}" for seed in self.seed], "task": ["count"] * n,
                "success": self.over & (self.seed % 2 == 0), "uncertainty": np.full(n, 0.25, np.float32),
                "time": self.count / 2}
        proprio = np.stack([self.seed, self.count], 1).astype(np.float32)
        return {"frames": {"eye": frames}, "proprio": proprio}, info


class Chunks:
    """Two actions per decision, drawn from the decision's seed; out of range on purpose."""

    chunk, version = 2, 7

    def __init__(self, log_prob=-1.5):
        self.log_prob, self.asked = log_prob, []

    def act(self, observation, seeds):
        n = len(observation.slot)
        self.asked.append((list(observation.slot), seeds))
        if seeds is None:
            action = np.zeros((n, 2, 1), np.float32)
        else:
            action = np.stack([np.random.default_rng(s).uniform(-3, 3, (2, 1)) for s in seeds]).astype(np.float32)
        return Action(token=np.full((n, 2, 1), 4, np.int16), action=action,
                      log_prob=np.full((n, 2, 1), self.log_prob, np.float32), value=np.zeros(n, np.float32))


def test_records_each_step_as_it_was():
    env, policy = CountingEnv(1), Chunks()
    (episode,) = rollout(env, policy, [[4]], sample=True)  # 4 % 3 + 2 = 3 steps: a chunk and half of the next
    assert len(episode) == 3
    assert episode.decision.tolist() == [True, False, True]
    assert episode.frames["eye"][:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert episode.proprio[:, 1].tolist() == [0, 1, 2, 3]
    assert episode.timestamp.tolist() == [0, 0.5, 1, 1.5]
    assert episode.reward.tolist() == [0, 0, 1]
    assert episode.terminated.tolist() == [False, False, True]
    assert episode.policy_version.tolist() == [7, 7, 7]
    assert episode.uncertainty.tolist() == [0.25] * 3
    assert np.array_equal(episode.action, np.concatenate(env.received))  # what was recorded is what was executed
    assert np.abs(episode.action).max() <= 1
    draws = [np.random.default_rng(decision_seed(4, d)).uniform(-3, 3, (2, 1)) for d in (0, 1)]
    assert np.allclose(episode.action, np.clip(np.concatenate(draws)[:3], -1, 1))
    assert episode.success is Success.YES
    assert episode.behaviour is Behaviour.LOGGED
    assert episode.provenance == {"simulator": "counter", "seed": 4}
    assert episode.instruction == "count 4"


def test_failure_truncates_and_unknown_log_prob_stays_unknown():
    (episode,) = rollout(CountingEnv(1), Chunks(log_prob=np.nan), [[3]], sample=False)
    assert episode.success is Success.NO
    assert episode.truncated.tolist() == [False, True]
    assert not episode.terminated.any()
    assert episode.behaviour is Behaviour.UNKNOWN
    assert np.isnan(episode.log_prob).all()


def test_episodes_do_not_depend_on_rows_or_neighbours():
    seeds = list(range(9))
    one = {e.provenance["seed"]: e for e in rollout(CountingEnv(1), Chunks(), [seeds], sample=True)}
    many = {e.provenance["seed"]: e
            for e in rollout(CountingEnv(4), Chunks(), [[8, 0], [1, 2, 3, 4], [], [5, 6, 7]], sample=True)}
    assert one.keys() == many.keys() == set(seeds)
    for seed in seeds:
        assert np.array_equal(one[seed].action, many[seed].action)
        assert np.array_equal(one[seed].frames["eye"], many[seed].frames["eye"])


def test_asks_only_rows_without_a_chunk_and_greedy_gets_no_seeds():
    policy, steps = Chunks(), []
    list(rollout(CountingEnv(2), policy, [[0], [2]], sample=False, on_step=steps.append))
    # seed 0 lasts 2 steps, seed 2 lasts 4: both look at step 0, only row 1 looks again at step 2
    assert policy.asked == [([0, 1], None), ([1], None)]
    assert steps == [2, 2, 1, 1]


def test_seeds_need_a_list_per_row():
    with pytest.raises(ValueError, match="each of 2 rows, got 1"):
        list(rollout(CountingEnv(2), Chunks(), [[1]], sample=True))


def test_decision_seeds_differ():
    seeds = {decision_seed(seed, decision) for seed in range(50) for decision in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**63 for seed in seeds)
