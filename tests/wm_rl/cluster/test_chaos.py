"""Fifty random kills in one run: nothing acknowledged is lost, it ends, and what it learned is as good.

The simulator is a fake that can be learned (``toy.LearnableEnv``). Policy, learner, world model, store and every actor
are the real ones, small.
"""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from data.rollout import rollout
from data.store import ReplayStore
from tests import examples
from tests.wm_rl.cluster import toy
from tests.wm_rl.cluster.processes import other_ranks, rows
from wm_rl.cluster import driver
from wm_rl.policy import TinyVLA
from wm_rl.seeding import TRAINING_SEEDS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]
KILLS, ITERATIONS, UPDATES = 54, 100, 8
TRIALS = 400


def play(folder):
    loop = toy.loop(folder, iterations=ITERATIONS, imagined=0.25, kind=toy.LearnableEnv, episodes=16, updates=UPDATES,
                    windows=16, num_envs=4, latency=0.05,
                    learner=replace(examples.LEARNER, learning_rate=2e-3, encoder_learning_rate=2e-3))
    loop.run(toy.runtime(collectors=2, inference_servers=2, learners=2, strategy="ddp", max_restarts=100).improve)


def success(folder):
    """Wins of the policy that a folder holds, in trials that no training saw; the same for all."""
    env = toy.LearnableEnv(num_envs=20)
    seeds = [range(row, TRIALS, env.num_envs) for row in range(env.num_envs)]
    assert max(map(max, seeds)) < TRAINING_SEEDS
    return np.array([t.success == "yes" for t in rollout(env, TinyVLA.load(folder), seeds, sample=True)])


def interval(wins, others):
    """Of the difference of two shares, 99 % (Newcombe 1998, method 10: from two Wilson intervals)."""
    z = norm.ppf(0.995)

    def wilson(wins):
        n, p = len(wins), wins.mean()
        middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)

    (p, low, high), (q, other_low, other_high) = wilson(wins), wilson(others)
    return p - q - np.hypot(p - low, other_high - q), p - q + np.hypot(high - p, q - other_low)


def kill(pid):
    """Unless it is dead already, which its driver may not have noticed yet."""
    with contextlib.suppress(OSError):
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::"):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def test_fifty_random_kills_lose_nothing_and_it_learns_as_much(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "Writer", toy.RecordingWriter)
    (tmp_path / "calm").mkdir()
    begun = time.monotonic()
    play(tmp_path / "calm" / "run")
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")

    draw, killed, due = random.Random(7), Counter(), [0.0]
    look = driver._Driver._ask_how_they_fare

    def then_kill(self):
        look(self)
        now = time.monotonic()
        if due[0] == 0 and self.version > 0:
            due[0] = now
        if sum(killed.values()) < KILLS and 0 < due[0] <= now:
            members = {"collector": self.collectors, "server": self.servers, "imaginer": self.dreams.imaginers,
                       "writer": [self.writer], "learner": [self.learner], "world model": [self.dreams.modeller]}
            kinds = {kind: [member.pid for member in some if member.up] for kind, some in members.items()}
            kinds["rank"] = [rank for pid in kinds["learner"] for rank in other_ranks(pid)]
            kind = draw.choice(sorted(kinds))
            if kinds[kind] and kill(draw.choice(kinds[kind])):
                killed[kind] += 1
                due[0] = now + draw.expovariate(1 / 1.5)

    monkeypatch.setattr(driver._Driver, "_ask_how_they_fare", then_kill)
    (tmp_path / "chaos").mkdir()
    chaos, begun = tmp_path / "chaos" / "run", time.monotonic()
    play(chaos)
    print(f"with {dict(killed)} killed: {time.monotonic() - begun:.0f} s")
    assert sum(killed.values()) == KILLS
    assert len(killed) == 7, killed

    told = rows(chaos)
    assert [row["step"] for row in told] == list(range(ITERATIONS))
    assert TinyVLA.load(chaos / "policy").version == ITERATIONS * UPDATES
    assert told[-1]["restarts"] >= KILLS - 3  # some may be dead and not yet found
    for folder in (tmp_path / "calm", tmp_path / "chaos"):
        acknowledged = (folder / "acknowledged").read_text().split()
        store = ReplayStore.open(folder / "run" / "replay.zarr")
        stored = Counter(toy.fingerprint(store.trajectory(i)) for i in range(len(store)))
        assert len(acknowledged) > ITERATIONS * 16
        assert set(acknowledged) <= set(stored), "an acknowledged episode is lost"
        assert max(stored.values()) == 1, "an episode is stored twice"
        simulated = np.flatnonzero(store.episodes.source == "sim")
        seeds = [store.provenance(i)["seed"] for i in simulated]
        assert len(set(seeds)) == len(seeds), "a seed was played twice"

    first, calm, stormy = map(success, (chaos / "warm_start", tmp_path / "calm" / "run" / "policy", chaos / "policy"))
    low, high = interval(stormy, calm)
    print(f"success {first.mean():.3f}; undisturbed {calm.mean():.3f}, with kills {stormy.mean():.3f}, "
          f"difference [{low:.3f}, {high:.3f}] (99 %)")
    assert first.mean() < 0.4
    assert min(calm.mean(), stormy.mean()) > 0.8, "it learns"
    assert low <= 0 <= high
