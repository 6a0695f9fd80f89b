"""The last stage over actors, with a toy simulator: it completes, and survives what can die."""

import json
import os
import signal

import numpy as np
import pytest

from data.store import ReplayStore
from tests.wm_rl.cluster import toy
from wm_rl.checkpoint import load_checkpoint
from wm_rl.cluster import driver
from wm_rl.policy import TinyVLA

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def rows(folder, kind="train"):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def check_whole(folder, iterations):
    """It ended, once through, with what it should have left."""
    store, told = ReplayStore.open(folder / "replay.zarr"), rows(folder)
    assert [row["step"] for row in told] == list(range(iterations))
    assert TinyVLA.load(folder / "policy").version == 4 * iterations
    assert load_checkpoint(folder / "checkpoints")["learner"]["version"] == 4 * iterations
    simulated = np.flatnonzero(store.episodes.source == "sim")[4:]  # after those that were there
    assert len(simulated) >= 4 * iterations
    seeds = [store.provenance(i)["seed"] for i in simulated]
    assert len(set(seeds)) == len(seeds), "an episode was played twice"
    for i in simulated:
        trajectory = store.trajectory(i)
        assert len(trajectory) == 4 + trajectory.provenance["seed"] % 5
        assert (trajectory.policy_version >= 0).all()
        assert (trajectory.policy_version <= 4 * iterations).all()
        assert (np.diff(trajectory.policy_version) >= 0).all() or any(row["restarts"] for row in told)
    assert all(row["trainer_utilisation"] > 0 for row in told)
    return store, told


def test_it_goes_on_whatever_dies(tmp_path, monkeypatch):
    """The one simulator exits, then hangs, then raises; an episode in three is poisoned; everybody else is killed."""
    checkpoint = driver._Driver._checkpoint

    def then_kill(self, iteration, learned):
        checkpoint(self, iteration, learned)
        victims = {1: [*self.servers, *self.imaginers, self.modeller], 2: [self.learner, self.writer]}
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
