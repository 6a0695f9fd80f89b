"""Where work waits in the model of a cluster: processors and links, one thing at a time, and servers of batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator
from typing import Any

import simpy

_QUANTUM = 0.005
"""Seconds after which somebody else gets a shared core."""


class Station:
    """Counts what is at one place: how many, how long, and how much of the time it works."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._inside: dict[int, float] = {}
        self._working = 0
        self._arrivals = 0
        self.forget()

    def forget(self) -> None:
        """Count from now on."""
        self._since = self._changed = self._env.now
        self._area = self._busy = self._sojourn = 0.0
        self.entered = self.left = 0

    def enter(self) -> int:
        """Somebody comes; the number under which to ``leave``."""
        self._integrate()
        self.entered += 1
        self._arrivals += 1
        self._inside[self._arrivals] = self._env.now
        return self._arrivals

    def leave(self, number: int) -> None:
        """That one goes."""
        self._integrate()
        self.left += 1
        self._sojourn += self._env.now - max(self._inside.pop(number), self._since)

    def work(self, change: int) -> None:
        """One more (1) or one less (−1) of those who work here does."""
        self._integrate()
        self._working += change

    def busy(self) -> float:
        """Seconds worked, summed over those who did."""
        self._integrate()
        return self._busy

    def number(self) -> float:
        """Mean number inside over time."""
        self._integrate()
        return self._area / (self._env.now - self._since)

    def time(self) -> float:
        """Seconds spent inside, summed over everybody who was, those still there included."""
        return self._sojourn + sum(self._env.now - max(since, self._since) for since in self._inside.values())

    def _integrate(self) -> None:
        passed = self._env.now - self._changed
        self._area += passed * len(self._inside)
        self._busy += passed * self._working
        self._changed = self._env.now


class Processor:
    """Does one thing at a time, first come, first served; with ``cores``, in turn with others who share them."""

    def __init__(self, env: simpy.Environment, cores: simpy.Resource | None, machine: Station) -> None:
        """``machine`` counts the work done on ``cores``; without them it counts this one's own."""
        self._env, self._cores, self._machine = env, cores, machine
        self._own = simpy.Resource(env, 1)
        self.station = Station(env)

    def work(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        """Wait for one's turn, then take that long."""
        if seconds <= 0:
            return
        number = self.station.enter()
        left = seconds
        while left > 1e-12:
            with self._own.request() as mine:
                yield mine
                if self._cores is None:
                    yield from self._spend(left)
                    break
                with self._cores.request() as core:
                    yield core
                    spent = min(left, _QUANTUM)
                    self._machine.work(1)
                    yield from self._spend(spent)
                    self._machine.work(-1)
                    left -= spent
        self.station.leave(number)

    def _spend(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        self.station.work(1)
        yield self._env.timeout(seconds)
        self.station.work(-1)


class Server:
    """Answers requests of one row in batches, which go off when they are full or their first request is old enough."""

    def __init__(self, env: simpy.Environment, processor: Processor, *, batch_size: int, max_age: float, fixed: float,
                 per_row: float) -> None:
        self._env, self._processor, self._batch_size, self._max_age = env, processor, batch_size, max_age
        self._fixed, self._per_row = fixed, per_row
        self._waiting: deque[tuple[float, int, simpy.Event]] = deque()
        self._arrival = env.event()
        self.station = Station(env)
        self.version = 0
        self.forget()
        env.process(self._serve())

    def forget(self) -> None:
        """Count from now on."""
        self.waits, self.batches = list[float](), list[int]()

    def forward(self, rows: int) -> float:
        """Time of a pass over a batch, padded to a power of two."""
        return self._fixed + self._per_row * (1 << (rows - 1).bit_length())

    def ask(self) -> simpy.Event:
        """An event that comes with the version that answered."""
        answer = self._env.event()
        self._waiting.append((self._env.now, self.station.enter(), answer))
        if len(self._waiting) in (1, self._batch_size) and not self._arrival.triggered:
            self._arrival.succeed()
        return answer

    def _serve(self) -> Generator[simpy.Event, Any, None]:
        while True:
            yield from self._batch()
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._batch_size))]
            version, begun = self.version, self._env.now
            self.station.work(1)
            yield from self._processor.work(self.forward(len(batch)))
            self.station.work(-1)
            self.batches.append(len(batch))
            for arrived, number, answer in batch:
                self.waits.append(begun - arrived)
                self.station.leave(number)
                answer.succeed(version)

    def _batch(self) -> Generator[simpy.Event, Any, None]:
        """Wait until a batch may go off."""
        while len(self._waiting) < self._batch_size:
            due = self._waiting[0][0] + self._max_age if self._waiting else math.inf
            if due - self._env.now <= 1e-12:
                return
            self._arrival = self._env.event()
            waits = [self._arrival] + ([self._env.timeout(due - self._env.now)] if math.isfinite(due) else [])
            yield self._env.any_of(waits)
