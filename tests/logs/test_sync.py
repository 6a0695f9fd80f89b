"""Reading streams at control steps: causal, and the same as the slow, obvious reading."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.logs.sync import gaps, grid, hold, linear, runs

TIMES = st.floats(-5, 5, allow_nan=False, width=32)
STAMPS = arrays(np.float64, st.integers(0, 12), elements=st.one_of(TIMES, st.sampled_from([np.nan, np.inf, 0.0, 1.0])))
WHEN = arrays(np.float64, st.integers(1, 9), elements=TIMES)


@settings(max_examples=300)
@given(time=STAMPS, at=WHEN)
def test_the_hold_never_uses_a_future_sample_and_misses_no_newer_one(time, at):
    held = hold(time, at)
    for when, index, age in zip(at, held.message, held.age, strict=True):
        past = [i for i in range(len(time)) if np.isfinite(time[i]) and round(time[i] * 1e6) <= round(when * 1e6)]
        if not past:
            assert age == np.inf
            continue
        assert index == max(past, key=lambda i: (round(time[i] * 1e6), i))
        assert time[index] <= when + 1e-6
        assert age == max(0.0, when - time[index])


@given(time=STAMPS, at=WHEN, later=st.lists(TIMES, max_size=4))
def test_what_comes_later_changes_nothing(time, at, later):
    before = hold(time, at)
    future = np.array([at.max() + 1 + abs(x) for x in later])
    after = hold(np.concatenate([time, future]), at)
    assert np.array_equal(before.age, after.age)
    assert np.array_equal(before.message[np.isfinite(before.age)], after.message[np.isfinite(after.age)])


@given(rate=st.sampled_from([3.0, 7.0, 15.0, 26.667, 30.0, 50.0]), begun=st.floats(0, 1e4))
def test_a_nominal_stamp_meets_its_own_step(rate, begun):
    time = begun + np.arange(200) / rate
    assert hold(time, grid(begun, time[-1], rate)).message.tolist() == list(range(200))


def test_linear_by_hand():
    time, values = np.array([0.0, 2.0, 1.0]), np.array([[0.0, 5.0], [20.0, 5.0], [10.0, 7.0]])
    read = linear(time, values, np.array([-0.1, 0.5, 1.5, 2.0, 2.1]))
    assert np.isnan(read[[0, 4]]).all()
    np.testing.assert_allclose(read[1:4], [[5, 6], [15, 6], [20, 5]])
    assert np.isnan(linear(np.array([np.nan]), values[:1], np.zeros(2))).all()


@given(first=TIMES, length=st.floats(0, 20), rate=st.floats(0.5, 200))
def test_a_grid_begins_and_ends_inside(first, length, rate):
    times = grid(first, first + length, rate)
    assert times[0] == first
    assert times[-1] <= first + length + 2e-6
    assert times[-1] + 1 / rate > first + length - 1e-6
    assert np.allclose(np.diff(times), 1 / rate)


@given(arrays(bool, st.integers(0, 20)))
def test_runs_cover_what_is_good(good):
    covered = np.zeros(len(good), bool)
    for first, last in runs(good):
        assert first < last
        assert good[first:last].all()
        assert first == 0 or not good[first - 1]
        covered[first:last] = True
    assert np.array_equal(covered, good)


def test_gaps_ignore_the_files_order():
    assert gaps(np.array([1.0, 0.0, np.nan, 3.0])).tolist() == pytest.approx([1.0, 2.0])
