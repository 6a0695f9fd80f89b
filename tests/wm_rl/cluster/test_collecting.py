"""A collector whose server and writer are plain objects of this process: no cluster is started."""

import threading
import time
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from tests import examples
from tests.wm_rl.cluster.toy import ToyEnv
from wm_rl.cluster import collecting, inference
from wm_rl.cluster.collecting import Collector


class Now:
    """A handle whose calls are done at once, by ``method``."""

    def __init__(self, method):
        self.method = method

    def options(self, **_):
        return self

    def remote(self, *arguments):
        return self.method(*arguments)


@pytest.fixture
def played():
    """Starts a collector; gives it, what its rows sent, and a way to wait for so many episodes."""
    policy, sent, lock, ended = examples.policy(), [], threading.Lock(), threading.Event()
    asked, collectors = [], []  # rows in each question
    threads = []

    def act(observation, seeds):
        asked.append(len(observation.slot))
        with lock:
            return policy.act(observation, seeds), 3

    def append(trajectory):
        if ended.is_set():
            raise RuntimeError("the test is over")
        sent.append(trajectory)

    def start(make_env, **changes):
        server, writer = SimpleNamespace(act=Now(act)), SimpleNamespace(append=Now(append))
        collector = Collector(make_env, server, writer, **{"parts": 3, "seed": 0, "chunk": 2, "limit": 3} | changes)
        failed = []

        def play():
            try:
                collector.play(5)
            except RuntimeError as error:
                failed.append(error)

        threads.append(threading.Thread(target=play, daemon=True))
        threads[0].start()
        collector.asked = asked
        collectors.append(collector)
        return collector, sent, failed

    with mock.patch.object(collecting.ray, "get", lambda value: value), \
            mock.patch.object(inference.ray, "get", lambda value: value):
        yield start
        ended.set()
        for collector in collectors:
            collector._over.set()
        time.sleep(0.2)


def wait(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_no_row_waits_for_another(played):
    """The second row's simulator hangs: the others play on, and the collector says for how long it is quiet."""
    hung = threading.Event()

    class Hangs(ToyEnv):
        def step(self, actions):
            hung.wait(60)
            return super().step(actions)

    collector, sent, _ = played(lambda row: Hangs(1) if row == 1 else ToyEnv(1))
    wait(lambda: len(sent) >= 20)
    status = collector.status()
    assert status["quiet"] > 0.05
    assert status["playing"] >= 1
    assert status["steps"] >= sum(map(len, sent[:20]))
    assert set(collector.asked) == {1}, "each row asks by itself"
    hung.set()
    wait(lambda: collector.status()["quiet"] < 0.05)


def test_no_seed_is_played_twice_and_every_episode_is_whole(played):
    _, sent, _ = played(lambda row: ToyEnv(1, latency=0.001))
    wait(lambda: len(sent) >= 30)
    seeds = [trajectory.provenance["seed"] for trajectory in sent]
    assert len(set(seeds)) == len(seeds)
    assert all(len(trajectory) == 4 + seed % 5 for trajectory, seed in zip(sent, seeds, strict=True))
    assert all((trajectory.policy_version == 3).all() for trajectory in sent)


def test_only_as_many_rows_play_as_may(played):
    collector, sent, _ = played(lambda row: ToyEnv(1, latency=0.005), limit=0)
    time.sleep(0.3)
    assert not sent
    assert collector.status() == {"steps": 0, "playing": 0, "lost": 0, "quiet": mock.ANY}
    assert collector.status()["quiet"] < 0.2  # who may not play is not hung
    collector.limit(2)
    wait(lambda: len(sent) >= 10)
    assert collector.status()["playing"] <= 2


def test_rows_of_one_world_play_together_as_many_as_may(played):
    collector, sent, _ = played(lambda part: ToyEnv(4, latency=0.002), parts=1, limit=3)
    wait(lambda: len(sent) >= 20)
    assert max(collector.asked) == 3
    assert collector.status()["playing"] <= 3
    collector.limit(0)
    wait(lambda: collector.status()["playing"] == 0)
    seeds = [trajectory.provenance["seed"] for trajectory in sent]
    assert len(set(seeds)) == len(seeds)
    assert all(len(trajectory) == 4 + seed % 5 for trajectory, seed in zip(sent, seeds, strict=True))


def test_a_simulator_that_raises_ends_the_play(played):
    def make(row):
        if row == 2:
            raise RuntimeError("the simulator lost its mind")
        return ToyEnv(1)

    _, _, failed = played(make)
    wait(lambda: failed)
    assert "lost its mind" in str(failed[0])
    assert np.all([isinstance(error, RuntimeError) for error in failed])
