"""Cloning learns what is shown, and labels what came without log-probs."""

import dataclasses

import numpy as np
import pytest
import torch

from data.store import ReplayStore
from data.types import Behaviour, Source
from tests import examples
from wm_rl.behaviour import label_unknown_behaviour
from wm_rl.cloning import CloningConfig, clone

CLONING = CloningConfig(steps=5, batch=16, learning_rate=1e-3, sources={"real": 1.0})


@pytest.fixture
def shown(tmp_path):
    """Logs whose action is a function of what is seen: bright frames mean +1, dark ones -1."""
    store = ReplayStore.create(tmp_path / "logs.zarr", spec=examples.SPEC, statistics=examples.STATISTICS,
                               embodiment="toy")
    logs = []
    for seed in range(12):
        t = examples.trajectory(seed, 7, Source.REAL, behaviour=Behaviour.UNKNOWN)
        bright = np.random.default_rng(seed).integers(0, 2, 8)
        frames = np.broadcast_to((bright * 255)[:, None, None, None], (8, 16, 16, 3)).astype(np.uint8)
        action = np.repeat((bright[:7] * 2 - 1)[:, None], 3, axis=1).astype(np.float32)
        logs.append(dataclasses.replace(t, frames={"front": frames}, action=action))
    store.append(logs[:8])
    store.append([*logs[8:], examples.trajectory(3, 5, Source.SIM)])
    return store


def test_it_learns(shown):
    policy, losses = examples.policy(), []
    config = CloningConfig(steps=60, batch=32, learning_rate=3e-3, sources={"real": 1.0})
    clone(policy, shown, config, seed=1, device=torch.device("cpu"), log=lambda step, m: losses.append(m["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_what_follows_a_success_is_not_imitated(tmp_path):
    def store(name, after):
        replay = ReplayStore.create(tmp_path / name, spec=examples.SPEC, statistics=examples.STATISTICS,
                                    embodiment="toy")
        for seed in (0, 2):
            t = examples.trajectory(seed, 8, Source.REAL, behaviour=Behaviour.UNKNOWN)
            action = np.concatenate([t.action[:5], np.full((3, 3), after, np.float32)])
            step = np.arange(8)
            replay.append([dataclasses.replace(t, action=action, terminated=step == 4, truncated=step < 0,
                                               reward=(step >= 4).astype(np.float32))])
        return replay

    policies = []
    for name, after in (("left", -1.0), ("right", 1.0)):
        policy, replay = examples.policy(), store(name, after)
        clone(policy, replay, CLONING, seed=0, device=torch.device("cpu"), log=lambda step, metrics: None)
        policies.append(policy)
        label_unknown_behaviour(policy, replay, np.array([], int))
        assert replay.trajectory(0).decision.tolist() == [True, False, True, False, True, False, False, False]
    left, right = (policy.state_dict() for policy in policies)
    assert all(torch.equal(left[name], right[name]) for name in left)
