"""Stretches in which a robot stands still. They are marked, not deleted: waiting may be part of the task."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32

from data.logs.sync import runs
from data.types import Statistics

IDLE_SECONDS = 1.0
"""A robot that stands still for less is between two motions."""
STILL = 0.01
"""Share of a dimension's range within which it is still."""
DEVIATIONS = 5
"""Standard deviations that a dimension of ``proprio`` ranges over, about."""


def idle_steps(
    proprio: Float32[np.ndarray, "r p"], action: Float32[np.ndarray, "r a"], statistics: Statistics, rate: float
) -> list[tuple[int, int]]:
    """First and one past the last of the steps of each stretch, of at least a second, in which nothing moves.

    Within a second neither a dimension of ``proprio`` nor of the (raw) ``action`` goes through more than a hundredth
    of its range. ``r`` rows have ``r - 1`` steps; the last action belongs to none.
    """
    steps = max(1, int(np.ceil(IDLE_SECONDS * rate)))
    if len(proprio) <= steps:
        return []
    span = statistics.action_high - statistics.action_low
    still = (_still(proprio, steps + 1, DEVIATIONS * statistics.proprio_std)
             & _still(action[:-1], steps, np.where(span > 0, span, np.finfo(np.float32).tiny)))
    return runs(np.convolve(still, np.ones(steps)) > 0.5)


def _still(values: Float32[np.ndarray, "n d"], rows: int, ranges: Float32[np.ndarray, " d"]) -> Bool[np.ndarray, " w"]:
    """Of each window of so many rows, whether all dimensions are still."""
    windows = np.lib.stride_tricks.sliding_window_view(values.astype(np.float64), rows, axis=0)
    return (windows.max(-1) - windows.min(-1) <= STILL * ranges).all(1)
