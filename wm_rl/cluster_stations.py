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
        self._arrivals = 0
        self._work: deque[tuple[float, float]] = deque()
        self.forget()

    def forget(self) -> None:
        """Count from now on."""
        self._since = self._changed = self._env.now
        self._area = self._done = self._sojourn = 0.0
        self.left = 0

    def enter(self) -> int:
        """Somebody comes; the number under which to ``leave``."""
        self._integrate()
        self._arrivals += 1
        self._inside[self._arrivals] = self._env.now
        return self._arrivals

    def leave(self, number: int) -> None:
        """That one goes."""
        self._integrate()
        self.left += 1
        self._sojourn += self._env.now - max(self._inside.pop(number), self._since)

    def will_work(self, begin: float, end: float) -> None:
        """It works from ``begin`` to ``end``, or did; a beginning never lies before that of an earlier call."""
        while self._work and self._work[0][1] <= self._env.now:
            self._done += self._since_then(*self._work.popleft())
        self._work.append((begin, end))

    def busy(self) -> float:
        """Seconds worked by now, summed over those who did."""
        return self._done + sum(self._since_then(begin, min(end, self._env.now)) for begin, end in self._work)

    def _since_then(self, begin: float, end: float) -> float:
        return max(0.0, end - max(begin, self._since))

    def number(self) -> float:
        """Mean number inside over time."""
        self._integrate()
        return self._area / (self._env.now - self._since)

    def time(self) -> float:
        """Seconds spent inside, summed over everybody who was, those still there included."""
        return self._sojourn + sum(self._env.now - max(since, self._since) for since in self._inside.values())

    def _integrate(self) -> None:
        self._area += (self._env.now - self._changed) * len(self._inside)
        self._changed = self._env.now


class Processor:
    """Does one thing at a time, first come, first served."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._free = 0.0
        self.station = Station(env)

    def work(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        """Wait for one's turn, then take that long: one event, as the order decides when that is over."""
        if seconds <= 0:
            return
        number = self.station.enter()
        begin = max(self._free, self._env.now)
        self._free = begin + seconds
        self.station.will_work(begin, self._free)
        yield self._env.timeout(self._free - self._env.now)
        self.station.leave(number)


class SharingProcessor:
    """The same on a machine with fewer cores than it has actors, who take turns."""

    def __init__(self, env: simpy.Environment, cores: simpy.Resource, machine: Station) -> None:
        """``machine`` counts the work done on all ``cores``."""
        self._env, self._cores, self._machine = env, cores, machine
        self._own = simpy.Resource(env, 1)
        self.station = Station(env)

    def work(self, seconds: float) -> Generator[simpy.Event, Any, None]:
        """As ``Processor.work``; waiting for a core comes on top."""
        number = self.station.enter() if seconds > 0 else 0
        left = seconds
        while left > 1e-12:
            with self._own.request() as mine, self._cores.request() as core:
                yield mine
                yield core
                now, spent = self._env.now, min(left, _QUANTUM)
                for station in (self.station, self._machine):
                    station.will_work(now, now + spent)
                yield self._env.timeout(spent)
                left -= spent
        if number:
            self.station.leave(number)


class Server:
    """Answers requests of one row in batches, which go off when they are full or their first request is old enough."""

    def __init__(
        self, env: simpy.Environment, processor: Processor | SharingProcessor, *, batch_size: int, max_age: float,
        fixed: float, per_row: float,
    ) -> None:
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
            yield from self._processor.work(self.forward(len(batch)))
            self.station.will_work(begun, self._env.now)
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
