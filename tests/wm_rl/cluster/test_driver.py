"""The last stage over actors, with a toy simulator: it completes, and survives what can die."""

import os
import signal

import numpy as np
import pytest

from data.types import UserError
from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.processes import check_whole, rows
from wm_rl.cluster import driver

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def test_it_goes_on_whatever_dies(tmp_path, monkeypatch):
    """The one simulator exits, then hangs, then raises; an episode in three is poisoned; everybody else is killed."""
    checkpoint = driver._Driver._checkpoint

    def then_kill(self, iteration, learned):
        checkpoint(self, iteration, learned)
        victims = {1: [*self.servers, *self.dreams.imaginers, self.dreams.modeller], 2: [self.learner, self.writer]}
        for member in victims.get(iteration, []):
            if member.up:
                os.kill(member.pid, signal.SIGKILL)

    monkeypatch.setattr(driver._Driver, "_checkpoint", then_kill)
    folder = tmp_path / "run"
    loop = toy.loop(folder, iterations=5, imagined=0.5, nan=True, faults=("exit", "hang", "raise"), num_envs=1,
                    marks=tmp_path / "marks")
    loop.run(toy.runtime(patience=20.0).improve)
    store, told = check_whole(folder, 5)
    assert (store.episodes.source == "imagined").any()
    assert len((tmp_path / "marks").read_text()) == 4, "each fault came once"
    assert told[-1]["restarts"] >= 3 + 4
    assert 0 < told[-1]["quarantined"] <= len(list((folder / "quarantine").glob("*.json")))
    assert all(np.isfinite(store.trajectory(i).reward).all() for i in range(len(store)))
    assert {"imagined_ratio", "imagined_success", "audit/psnr", "lag", "inference/latency_p99_ms"} <= set(told[-1])
    assert loop.model().version > 1
    assert rows(folder, "world_model")


def test_an_actor_that_cannot_start_is_one_line(tmp_path):
    loop = toy.loop(tmp_path / "run")
    loop.learner_config = None
    with pytest.raises(UserError, match="the learner could not be started"):
        loop.run(toy.runtime().improve)
