"""Confidence intervals for success rates, and for the difference of two rates measured on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from data.types import UserError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its two-sided confidence interval."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """True when the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a proportion (Wilson 1927): close to its nominal coverage at every rate."""
    _check_counts(successes, trials)
    z = stats.norm.ppf((1 + confidence) / 2)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    # at 0 and at all successes rounding may leave the bound a hair inside the estimate
    return Interval(estimate=rate, low=max(0.0, min(centre - half, rate)), high=min(1.0, max(centre + half, rate)))


def exact(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Clopper and Pearson's interval (1934): covers at least as often as it says, so it is wider than Wilson's."""
    _check_counts(successes, trials)
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, successes, trials - successes + 1) if successes > 0 else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, trials - successes) if successes < trials else 1.0
    return Interval(estimate=successes / trials, low=float(low), high=float(high))


def paired_difference(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Interval for ``mean(after) - mean(before)`` where entry ``i`` of both is the same task and seed.

    Newcombe's hybrid score interval for paired proportions (Statistics in Medicine 17:2635, 1998, method 10): the
    Wilson limits of both rates, combined with the correlation that the pairs show, corrected for continuity. Closed
    form, no resampling, sensible with no discordant pair and at rates of 0 and 1. Pairs of several tasks may be
    pooled: that ignores that each task has the same number of trials in any repetition, which makes the interval a
    little wider than it need be.

    Raises:
        UserError: when the two differ in length or are empty.

    """
    if len(before) != len(after) or not before:
        raise UserError(f"expected the same trials before and after, got {len(before)} and {len(after)}")
    trials = len(before)
    both = sum(bool(x) and bool(y) for x, y in zip(before, after, strict=True))
    gained = sum(not x and bool(y) for x, y in zip(before, after, strict=True))
    lost = sum(bool(x) and not y for x, y in zip(before, after, strict=True))
    neither = trials - both - gained - lost
    old, new = wilson(both + lost, trials, confidence), wilson(both + gained, trials, confidence)
    correlation = _correlation(both, gained, lost, neither)
    below, above = new.estimate - new.low, old.high - old.estimate
    low = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    below, above = old.estimate - old.low, new.high - new.estimate
    high = math.sqrt(max(0.0, below**2 - 2 * correlation * below * above + above**2))
    difference = (gained - lost) / trials
    return Interval(estimate=difference, low=max(-1.0, difference - low), high=min(1.0, difference + high))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    """Newcombe's continuity-corrected phi of the two-by-two table; 0 when a margin is empty."""
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if margins == 0:
        return 0.0
    trials = both + gained + lost + neither
    concordance = both * neither - gained * lost
    corrected = max(concordance - trials / 2, 0) if concordance > 0 else concordance
    return corrected / math.sqrt(margins)


def _check_counts(successes: int, trials: int) -> None:
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"expected 0 <= successes <= trials and at least one trial, got {successes} of {trials}")
