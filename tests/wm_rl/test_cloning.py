"""Cloning learns what is shown, and labels what came without log-probs."""

import dataclasses

import numpy as np
import pytest
import torch

from data.store import ReplayStore
from data.types import Behaviour, Source
from tests import examples
from wm_rl.cloning import CloningConfig, clone, label_unknown_behaviour


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


def test_it_learns_and_labels(shown):
    policy, losses = examples.policy(), []
    config = CloningConfig(steps=60, batch=32, learning_rate=3e-3, sources={"real": 1.0})
    clone(policy, shown, config, seed=1, device=torch.device("cpu"), log=lambda step, m: losses.append(m["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])

    assert label_unknown_behaviour(policy, shown) == 12
    assert label_unknown_behaviour(policy, shown) == 0
    logged = shown.trajectory(12)
    assert logged.behaviour is Behaviour.LOGGED
    for index in (0, 9):
        t = shown.trajectory(index)
        assert t.behaviour is Behaviour.CLONED
        assert t.decision.tolist() == [True, False, True, False, True, False, True]
        assert (t.action_token == np.where(t.action > 0, 4, 0)).all()
        for start in (0, 2, 6):  # an independent pass over single observations
            words = policy.words([t.instruction])
            output = policy({"front": torch.from_numpy(t.frames["front"][start : start + 1].copy())},
                            torch.from_numpy(t.proprio[start : start + 1].copy()), words)
            log_probs = output.logits.log_softmax(-1)[0].detach().numpy()
            for i in range(min(2, 7 - start)):
                expected = [log_probs[i, d, t.action_token[start + i, d]] for d in range(3)]
                np.testing.assert_allclose(t.log_prob[start + i], expected, atol=1e-5)
