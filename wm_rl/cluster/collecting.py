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
    """Plays episodes for ever, each row in a thread at its own pace: none waits for another row's simulator or episode.

    ``status`` and ``limit`` answer meanwhile.
    """

    def __init__(
        self, make_env: Callable[[int], Env], server: Any, writer: Any, *, rows: int, seed: int, chunk: int, limit: int
    ) -> None:
        """``make_env(i)``: row ``i`` alone. ``server``, ``writer``: handles of an ``InferenceServer`` and a ``Writer``.

        ``limit``: rows that may play, at first.
        """
        self._make_env, self._seed, self._limit = make_env, seed, limit
        self._rows = [_Row(server, writer, chunk=chunk) for _ in range(rows)]
        self._over = threading.Event()

    def play(self, stream: int) -> None:
        """Play the training episodes of ``stream`` until killed; raises what a row raises, which ends the others."""
        numbers = itertools.count()
        pool = ThreadPoolExecutor(len(self._rows), "row")
        try:
            for row in as_completed([pool.submit(self._play_row, i, stream, numbers) for i in range(len(self._rows))]):
                row.result()
        finally:
            self._over.set()

    def limit(self, rows: int) -> None:
        """From now on only so many rows begin episodes."""
        self._limit = rows

    def status(self) -> dict[str, float]:
        """Control steps so far, episodes being played, episodes lost, and seconds that a step has taken by now."""
        return {"steps": sum(row.steps for row in self._rows), "playing": sum(row.playing for row in self._rows),
                "lost": sum(row.outbox.lost for row in self._rows), "quiet": max(row.quiet() for row in self._rows)}

    def _play_row(self, i: int, stream: int, numbers: Iterator[int]) -> None:
        """Make the environment in this thread, as a GL context belongs to one, and play."""
        row = self._rows[i]

        def seeds() -> Iterator[int | None]:
            while True:
                row.playing = i < self._limit and not self._over.is_set()
                yield training_episode(self._seed, "stream", stream, next(numbers)) if row.playing else None

        with contextlib.closing(self._make_env(i)) as env:
            while not self._over.is_set():
                for trajectory in rollout(env, row.policy, [seeds()], sample=True, on_step=row.on_step):
                    with row.elsewhere():
                        row.outbox.send(trajectory)
                with row.elsewhere():
                    time.sleep(_PAUSE)


class _Row:
    """One row: how far it is, and what it waits for."""

    def __init__(self, server: Any, writer: Any, *, chunk: int) -> None:
        self.policy = RemotePolicy(server, chunk=chunk, waiting=self.elsewhere)
        self.outbox = Outbox(writer)
        self.steps, self.playing = 0, False
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
