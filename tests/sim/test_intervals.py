from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.types import UserError
from sim.intervals import _correlation, exact, paired_difference, wilson


def test_wilson_and_exact_against_published_numbers():
    # 15 of 148: Newcombe 1998 (Statistics in Medicine 17:857), table I: score .0624 .1605, exact .0578 .1617
    score, clopper = wilson(15, 148), exact(15, 148)
    assert (round(score.low, 4), round(score.high, 4)) == (0.0624, 0.1605)
    assert (round(clopper.low, 4), round(clopper.high, 4)) == (0.0578, 0.1617)
    # 0 of 20: score 0 .1611, exact 0 .1684 (same table)
    assert (wilson(0, 20).low, round(wilson(0, 20).high, 4)) == (0, 0.1611)
    assert (exact(0, 20).low, round(exact(0, 20).high, 4)) == (0, 0.1684)


def _pairs(both, lost, gained, neither):
    before = [True] * (both + lost) + [False] * (gained + neither)
    after = [True] * both + [False] * lost + [True] * gained + [False] * neither
    return before, after


def test_paired_difference_by_hand():
    # Newcombe 1998 (Statistics in Medicine 17:2635), table III: a=36 b=12 c=2 d=0, method 10: .0569 .3404
    before, after = _pairs(36, 2, 12, 0)
    interval = paired_difference(before, after)
    assert interval.estimate == pytest.approx(0.2)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_difference_laws(pairs):
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    forward, backward = paired_difference(before, after), paired_difference(after, before)
    assert -1 <= forward.low <= forward.estimate <= forward.high <= 1
    assert forward.low == pytest.approx(-backward.high)
    assert forward.high == pytest.approx(-backward.low)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_single_rate_laws(counts):
    for interval in (wilson(*counts), exact(*counts)):
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize("shift", [0.0, 0.15, 0.35])
@pytest.mark.parametrize("shared", [0.0, 0.6])
def test_paired_coverage(shift, shared):
    """Four tasks of 25 pairs, rates that differ by task, outcomes correlated within a pair: covers at 95 %."""
    random = np.random.default_rng(3)
    tasks, covered, runs = np.repeat([0.2, 0.4, 0.5, 0.6], 25), 0, 600
    for _ in range(runs):
        luck = random.random((2, 100))
        same = random.random(100) < shared
        luck[1, same] = luck[0, same]
        interval = paired_difference((luck[0] < tasks).tolist(), (luck[1] < tasks + shift).tolist())
        covered += interval.low <= shift <= interval.high
    assert 0.93 <= covered / runs <= 0.995


def test_bad_counts_are_one_line():
    for arguments in ((3, 2), (0, 0), (-1, 5)):
        with pytest.raises(UserError, match="successes"):
            wilson(*arguments)
    with pytest.raises(UserError, match="same trials"):
        paired_difference([True], [True, False])


def test_correlation_by_hand():
    # 28 pairs: 10*10 - 6*2 = 88, less 28/2 for continuity = 74; margins 16*12*12*16 = 192**2
    assert _correlation(10, 6, 2, 10) == pytest.approx(74 / 192)
    assert _correlation(5, 4, 4, 5) == 0  # 25 - 16 = 9, all of it within 18/2
    assert _correlation(1, 3, 2, 1) == pytest.approx((1 - 6) / (4 * 3 * 3 * 4) ** 0.5)  # negative: not corrected
    assert _correlation(5, 0, 0, 0) == 0
