"""The balance of collecting and updating: who is ahead waits, and nobody else does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from wm_rl.cluster.config import RayRuntime
from wm_rl.loop import LoopConfig

_SPOKEN = 16
"""Newest arrivals whose mean lag counts."""


@dataclass
class Pace:
    """How many updates the learner may take, and how many rows each collector may play."""

    ratio: float
    """Updates per collected episode; inf: neither side waits for the other."""
    max_lag: float
    rows: int
    """Of one collector."""
    slack: int
    """Episodes that collectors may be ahead of the learner."""
    collected: int
    version: int
    allowed_rows: int = 0
    _lags: deque[float] = field(default_factory=lambda: deque(maxlen=_SPOKEN))

    @staticmethod
    def of(runtime: RayRuntime, loop: LoopConfig, *, rows: int, collected: int, version: int) -> Pace:
        """Of a run's settings and counters."""
        ratio = runtime.updates_per_episode or loop.updates_per_iteration / loop.episodes_per_iteration
        return Pace(ratio=ratio, max_lag=runtime.max_lag, rows=rows, slack=loop.episodes_per_iteration,
                    collected=collected, version=version, allowed_rows=rows)

    @property
    def limit(self) -> int:
        """Rows that a collector may play at a time; 0 while the learner is behind."""
        behind = math.isfinite(self.ratio) and self.collected - self.version / self.ratio > self.slack
        return 0 if behind else self.allowed_rows

    def updates_allowed(self, version: int) -> int:
        """Updates beyond ``version`` that what was collected pays for; any number where the ratio is infinite."""
        return math.floor(self.ratio * self.collected - version + 1e-9) if math.isfinite(self.ratio) else 2**31

    def arrived(self, lags: Sequence[float], version: int) -> None:
        """Episodes came in with these mean lags. Too much of it halves the rows, too little lets one more play."""
        self.version = version
        self.collected += len(lags)
        self._lags.extend(lags)
        if not lags:
            return
        mean = sum(self._lags) / len(self._lags)
        if mean > self.max_lag:
            self.allowed_rows = max(1, self.allowed_rows // 2)
            self._lags.clear()
        elif self.allowed_rows < self.rows and mean < self.max_lag / 2:
            self.allowed_rows += 1
