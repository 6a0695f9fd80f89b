"""Who makes episodes in a simulator.

A collector plays ``data.rollout``'s one loop with a policy that lives on an inference server, and hands each episode to
the writer as it ends, through Ray's object store: no file system is shared with it.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import RayActorError

from data.rollout import rollout
from data.types import Env, Trajectory
from wm_rl.cluster.crew import Actor
from wm_rl.cluster.inference import RemotePolicy
from wm_rl.seeding import training_episode

_UNDERWAY = 8
"""Episodes on their way to the writer above which whoever sends more waits for it."""
_PAUSE = 0.02
"""Seconds between two looks of an idle collector at its limit."""


class Outbox:
    """Episodes on their way to a writer. One that a dying writer lost is counted, and not sent again."""

    def __init__(self, writer: Any) -> None:
        self._writer, self._sent = writer, deque[Any]()
        self.lost = 0

    def send(self, trajectory: Trajectory) -> None:
        """Hand it over; wait only while too many are underway."""
        self._sent.append(self._writer.append.remote(trajectory))
        self.settle(_UNDERWAY)

    def settle(self, underway: int = 0) -> None:
        """Wait until no more than that many are underway."""
        while len(self._sent) > underway:
            try:
                ray.get(self._sent.popleft())
            except RayActorError:
                self.lost += 1
                ray.get(self._writer.ready.options(max_task_retries=-1).remote())  # wait for its successor


class Collector(Actor):
    """Plays episodes for ever, at most ``limit`` at a time. ``status`` and ``limit`` answer while it does."""

    def __init__(
        self, make_env: Callable[[], Env], server: Any, writer: Any, *, seed: int, chunk: int, limit: int
    ) -> None:
        """``server``, ``writer``: handles of an ``InferenceServer`` and a ``Writer``. ``limit``: rows, at first."""
        self._make_env, self._seed, self._limit = make_env, seed, limit
        self._policy = RemotePolicy(server, chunk=chunk, waiting=self._elsewhere)
        self._outbox, self._simulating = Outbox(writer), True
        self._begun = self._ended = self._steps = 0
        self._alive_at = time.monotonic()

    def play(self, stream: int) -> None:
        """Make the environment, in this thread, and play the training episodes of ``stream`` until killed."""
        numbers = itertools.count()

        def seeds() -> Iterator[int | None]:
            while True:
                if self._begun - self._ended >= self._limit:
                    yield None
                else:
                    self._begun += 1
                    yield training_episode(self._seed, "stream", stream, next(numbers))

        with contextlib.closing(self._make_env()) as env:
            while True:
                for trajectory in rollout(env, self._policy, [seeds()] * env.num_envs, sample=True,
                                          on_step=self._on_step):
                    self._ended += 1
                    with self._elsewhere():
                        self._outbox.send(trajectory)
                with self._elsewhere():
                    time.sleep(_PAUSE)

    def limit(self, rows: int) -> None:
        """From now on begin no episode while this many are being played."""
        self._limit = rows

    def status(self) -> dict[str, float]:
        """Control steps so far, episodes being played, episodes lost, and seconds that a step has taken by now."""
        return {"steps": self._steps, "playing": self._begun - self._ended, "lost": self._outbox.lost,
                "quiet": time.monotonic() - self._alive_at if self._simulating else 0.0}

    @contextlib.contextmanager
    def _elsewhere(self) -> Iterator[None]:
        """What takes time here is not the simulator's doing."""
        self._simulating = False
        yield
        self._alive_at, self._simulating = time.monotonic(), True

    def _on_step(self, rows: int) -> None:
        self._steps += rows
        self._alive_at = time.monotonic()
