"""Imagined episodes whose actions are those that were recorded must end in the simulator as the recorded ones did."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest

from data.rollout import rollout
from data.store import ReplayStore
from data.types import Source, Success
from sim.expert import ExpertConfig, ScriptedExpert
from sim.metaworld import MetaWorldConfig
from sim.vector import VectorEnv
from wm_rl.claims import play_branches
from world_model.imagination import Branch

TASKS = ["coffee-button-v3", "drawer-close-v3"]


@pytest.fixture(scope="module")
def env():
    config = MetaWorldConfig(image_size=16, max_episode_steps=30)
    with contextlib.closing(VectorEnv(tasks=TASKS, num_envs=2, workers=0, config=config)) as made:
        yield made


@pytest.mark.sim
def test_what_was_done_comes_true_and_what_was_not_does_not(env, tmp_path):
    expert = ScriptedExpert(env, ExpertConfig(burst_probability=0.1))
    episodes = list(rollout(env, expert, [[1, 2], [3, 4]], sample=True))
    store = ReplayStore.create(tmp_path / "store", spec=env.spec, statistics=env.statistics, embodiment=env.embodiment)
    store.append(episodes)
    branches, imagined, ended = [], [], []
    for index, episode in enumerate(episodes):
        for step in (0, 5, 5, len(episode) - 1):
            tail = {name: getattr(episode, name)[step:] for name in (
                "proprio", "action", "action_token", "log_prob", "decision", "reward", "terminated", "truncated",
                "policy_version", "uncertainty", "timestamp")}
            frames = {camera: rows[step:] for camera, rows in episode.frames.items()}
            done = dataclasses.replace(episode, **tail, frames=frames, source=Source.IMAGINED)
            ended.append(episode.success is Success.YES)
            branches += [Branch(episode=index, step=step, provenance={})] * 2
            imagined += [done, dataclasses.replace(done, action=np.tile(np.float32([0, 0, 1, 0]), (len(done), 1)))]
    came = play_branches(env, store, branches, imagined)
    assert came[::2] == ended
    assert sum(ended) >= 8
    assert not any(came[1::2][i] for i in range(len(came) // 2) if branches[2 * i].step < 6)  # the hand went up
