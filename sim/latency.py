"""Meta-World with a simulator's latency: what a slow, remote or GPU simulator looks like to this machine's CPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.types import UserError
from sim.vector import VectorEnv


class LatentVectorEnv(VectorEnv):
    """A ``VectorEnv`` whose control steps each take ``latency_ms`` of sleep beside their own computation.

    Every row has a latency of its own; rows that are stepped together are waited for together, so a call sleeps as long
    as the slowest of those that are playing. ``variation`` is the coefficient of variation over steps, log-normal; 0
    makes every step take the same. A reset takes none.
    """

    def __init__(self, *, latency_ms: float, variation: float = 0.0, **rows: Any) -> None:
        """``rows``: what ``VectorEnv`` takes. Raises ``UserError`` for a time or a variation below 0."""
        if latency_ms < 0 or variation < 0:
            raise UserError(f"expected env.latency_ms and env.variation of at least 0, got {latency_ms} and "
                            f"{variation}; type e.g. env.latency_ms=50")
        super().__init__(**rows)
        self.latency, self.variation = latency_ms / 1e3, variation
        self._draw = np.random.default_rng((rows.get("only") or [0])[0])

    def step(
        self, actions: Float32[np.ndarray, "n a"]
    ) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """See ``VectorEnv.step``."""
        playing = int(self._playing.sum())
        answer = super().step(actions)
        if playing and self.latency:
            spread = np.sqrt(np.log1p(self.variation**2))
            factors = np.exp(spread * self._draw.standard_normal(playing) - spread**2 / 2)  # of mean 1
            time.sleep(self.latency * float(factors.max()))
        return answer
