"""Who makes episodes in a simulator.

A collector plays ``data.rollout``'s one loop with a policy that lives on an inference server, and hands each episode to
the writer as it ends, through Ray's object store: no file system is shared with it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import ray
from ray.exceptions import RayActorError

from data.rollout import rollout
from data.types import Env, Trajectory
from wm_rl.cluster.crew import Actor
from wm_rl.cluster.inference import RemotePolicy
from wm_rl.seeding import training_episode

_UNDERWAY = 2
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
    """Plays episodes for ever, each part of the rows in a thread at its own pace: none waits for another's simulator.

    ``status`` and ``limit`` answer meanwhile.
    """

    def __init__(
        self, make_env: Callable[[int], Env], server: Any, writer: Any, *, parts: int, seed: int, chunk: int, limit: int
    ) -> None:
        """``make_env(i)``: part ``i`` of the rows, most often one row; all have as many.

        ``server``, ``writer``: handles of an ``InferenceServer`` and a ``Writer``. ``limit``: rows that may play, at
        first.
        """
        self._make_env, self._seed, self._limit = make_env, seed, limit
        self._parts = [_Part(server, writer, chunk=chunk) for _ in range(parts)]
        self._over = threading.Event()

    def play(self, stream: int) -> None:
        """Play the training episodes of ``stream`` until killed; raises what a part raises, which ends the others."""
        numbers = itertools.count()
        pool = ThreadPoolExecutor(len(self._parts), "rows")
        try:
            playing = [pool.submit(self._play_part, i, stream, numbers) for i in range(len(self._parts))]
            for part in as_completed(playing):
                part.result()
        finally:
            self._over.set()

    def limit(self, rows: int) -> None:
        """From now on only so many rows begin episodes."""
        self._limit = rows

    def status(self) -> dict[str, float]:
        """Control steps so far, episodes being played, episodes lost, and seconds that a step has taken by now."""
        return {"steps": sum(part.steps for part in self._parts),
                "playing": sum(len(part.playing) for part in self._parts),
                "lost": sum(part.outbox.lost for part in self._parts),
                "quiet": max(part.quiet() for part in self._parts)}

    def _play_part(self, i: int, stream: int, numbers: Iterator[int]) -> None:
        """Make the environment in this thread, as a GL context belongs to one, and play."""
        part = self._parts[i]

        def seeds(row: int) -> Iterator[int | None]:
            while True:
                part.playing.discard(row)
                if row < self._limit and not self._over.is_set():
                    part.playing.add(row)
                yield training_episode(self._seed, "stream", stream, next(numbers)) if row in part.playing else None

        with contextlib.closing(self._make_env(i)) as env:
            rows = range(i * env.num_envs, (i + 1) * env.num_envs)
            while not self._over.is_set():
                episodes = [seeds(row) for row in rows]
                for trajectory in rollout(env, part.policy, episodes, sample=True, on_step=part.on_step):
                    with part.elsewhere():
                        part.outbox.send(trajectory)
                with part.elsewhere():
                    time.sleep(_PAUSE)


class _Part:
    """Rows that are stepped together: how far they are, and what they wait for."""

    def __init__(self, server: Any, writer: Any, *, chunk: int) -> None:
        self.policy = RemotePolicy(server, chunk=chunk, waiting=self.elsewhere)
        self.outbox = Outbox(writer)
        self.steps = 0
        self.playing: set[int] = set()
        self._simulating, self._alive_at = True, time.monotonic()

    def on_step(self, rows: int) -> None:
        """After each control step."""
        self.steps += rows
        self._alive_at = time.monotonic()

    def quiet(self) -> float:
        """Seconds that the simulator has taken by now."""
        return time.monotonic() - self._alive_at if self._simulating else 0.0

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What takes time here is not the simulator's doing."""
        self._simulating = False
        yield
        self._alive_at, self._simulating = time.monotonic(), True
