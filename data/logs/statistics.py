"""What a store made from logs normalises by, and how logs fit one that is there already.

The action range is from the 1 % to the 99 % quantile of all commands, recomputed from the data (stored quantiles of
parts cannot be merged), so that one faulty reading does not press all others into a corner; what lies outside is
clipped. A quantile would cut off the rare value that matters where a dimension has few (a gripper, a mode), or nearly
always the same: there the range is the full one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float32, Int64

from data.types import Statistics, UserError

RANGES = ("quantile", "range")
TAIL = 0.01
"""Share of a dimension's values that lies beyond either end of a quantile range."""
LEVELS = 16
"""A dimension with no more different values is one of levels."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Statistics, and how they came about."""

    statistics: Statistics
    origin: str
    """For people: what they were computed from."""
    full: Mapping[int, str] = field(default_factory=dict)
    """Action dimensions that have the full range in spite of ``quantile``, and why."""


def fit(proprio: Float32[np.ndarray, "r p"], action: Float32[np.ndarray, "t a"], kind: str) -> Fitted:
    """Statistics of these rows and steps: the range is of ``kind`` (``RANGES``), the moments are plain ones."""
    low, high, full = action.min(0), action.max(0), {}
    for i, column in enumerate(action.T if kind == "quantile" else ()):
        ends = np.quantile(column.astype(np.float64), [TAIL, 1 - TAIL]).astype(np.float32)
        levels = len(np.unique(column))
        if levels == 1:
            continue
        if levels <= LEVELS:
            full[i] = f"it has {levels} different values"
        elif ends[0] == ends[1]:
            full[i] = f"its {TAIL:.0%} and {1 - TAIL:.0%} quantiles are equal"
        else:
            low[i], high[i] = ends
    state = proprio.astype(np.float64)
    deviation = state.std(0)
    return Fitted(
        statistics=Statistics(action_low=low, action_high=high, proprio_mean=state.mean(0).astype(np.float32),
                              proprio_std=np.where(deviation > 1e-6, deviation, 1).astype(np.float32)),
        origin=f"{TAIL:.0%} and {1 - TAIL:.0%} quantiles of the actions" if kind == "quantile" else
        "minimum and maximum of the actions", full=full)


def outside(statistics: Statistics, action: Float32[np.ndarray, "t a"]) -> tuple[
    Bool[np.ndarray, "t a"], Bool[np.ndarray, "t a"]
]:
    """Which raw values lie below and above the range, by more than rounding: 1e-4 of the range."""
    low, high = statistics.action_low, statistics.action_high
    slack = 1e-4 * (high - low) + 1e-6 * np.maximum(np.abs(low), np.abs(high))
    return action < low - slack, action > high + slack


def clipped(statistics: Statistics, action: Float32[np.ndarray, "t a"]) -> Int64[np.ndarray, " a"]:
    """How many values of each dimension clipping changes."""
    below, above = outside(statistics, action)
    return (below | above).sum(0)


def check_range(
    statistics: Statistics, action: Float32[np.ndarray, "t a"], names: Sequence[str], *, kind: str, what: str
) -> None:
    """Raise ``UserError`` when a range that is given would clip these actions more than one fitted to them would.

    With ``quantile`` a hundredth of a dimension's values, rounded up, may lie beyond either end; with ``range`` none.
    """
    allowed = int(np.ceil(TAIL * len(action))) if kind == "quantile" else 0
    below, above = (each.sum(0) for each in outside(statistics, action))
    worst = np.maximum(below, above)
    if (worst > allowed).any():
        i = int(np.argmax(worst))
        raise UserError(
            f"actions do not fit: {names[i]} goes from {action[:, i].min():.4g} to {action[:, i].max():.4g}, and "
            f"{below[i] + above[i]} of its {len(action)} values lie outside the range of {what}, "
            f"[{statistics.action_low[i]:.4g}, {statistics.action_high[i]:.4g}]; give another store=<folder>, or type "
            "logs.clip=true")
