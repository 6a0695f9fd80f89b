"""Streams with clocks of their own, read at the control steps of one.

The default is the causal zero-order hold: what was known at a time is the newest message that is not from its future.
Nearest-neighbour matching leaks the future (17 % of the steps of a real bag).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64


class Held(NamedTuple):
    """The message in force at each time."""

    message: Int64[np.ndarray, " k"]
    """Its number in the stream; 0 where there is none yet."""
    age: Float64[np.ndarray, " k"]
    """Seconds since it was stamped; infinite where there is none yet."""


def grid(first: float, last: float, rate: float) -> Float64[np.ndarray, " k"]:
    """Times from ``first`` on, ``1 / rate`` s apart, up to ``last`` (to the microsecond)."""
    return first + np.arange(int(np.floor((last - first + 1e-6) * rate)) + 1) / rate


def hold(time: Float64[np.ndarray, " n"], at: Float64[np.ndarray, " k"]) -> Held:
    """Newest message stamped at or before each time; of several with one stamp the last in the file.

    ``time`` need not increase. Messages without a finite stamp are never used. Times are compared in whole
    microseconds, so that a nominal stamp meets its own step.
    """
    usable = np.flatnonzero(np.isfinite(time))
    if not len(usable):
        return Held(message=np.zeros(len(at), np.int64), age=np.full(len(at), np.inf))
    stamps = _microseconds(time[usable])
    order = np.argsort(stamps, kind="stable")
    place = np.searchsorted(stamps[order], _microseconds(at), side="right") - 1
    index = usable[order[np.maximum(place, 0)]]
    age = np.where(place >= 0, np.maximum(at - time[index], 0), np.inf)
    return Held(message=np.where(place >= 0, index, 0), age=age)


def linear(
    time: Float64[np.ndarray, " n"], values: Float64[np.ndarray, "n d"], at: Float64[np.ndarray, " k"]
) -> Float64[np.ndarray, "k d"]:
    """Between the messages before and after each time, which looks ahead; NaN before the first and after the last."""
    usable = np.flatnonzero(np.isfinite(time))
    order = usable[np.argsort(time[usable], kind="stable")]
    stamps, columns = time[order], values[order]
    if not len(stamps):
        return np.full((len(at), values.shape[1]), np.nan)
    outside = (at < stamps[0]) | (at > stamps[-1])
    read = np.stack([np.interp(at, stamps, column) for column in columns.T], axis=1)
    return np.where(outside[:, None], np.nan, read)


def gaps(time: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n1"]:
    """Seconds from each message to the next, in the order of the stamps; one fewer than finite stamps."""
    return np.diff(np.sort(time[np.isfinite(time)]))


def runs(good: Bool[np.ndarray, " k"]) -> list[tuple[int, int]]:
    """First and one past the last of every unbroken stretch of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], good, [False]]).astype(np.int8)))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _microseconds(time: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    return np.round(time * 1e6).astype(np.int64)
