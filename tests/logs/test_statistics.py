"""What a store made from logs normalises by, for every input."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.logs.statistics import LEVELS, RANGES, check_range, clipped, fit
from data.types import Statistics, UserError

NUMBERS = st.floats(-1e6, 1e6, width=32)
ACTIONS = arrays(np.float32, st.tuples(st.integers(1, 60), st.integers(1, 3)), elements=NUMBERS)


def state(rows):
    return np.arange(2.0 * rows, dtype="f4").reshape(rows, 2)


@given(ACTIONS, st.sampled_from(RANGES))
def test_logs_fit_the_range_that_was_made_of_them(action, kind):
    """Else a run that was cut could not go on, nor be repeated."""
    statistics = fit(state(9), action, kind).statistics
    assert (statistics.action_low <= statistics.action_high).all()
    assert (statistics.action_low >= action.min(0)).all()
    assert (statistics.action_high <= action.max(0)).all()
    check_range(statistics, action, "uvw", kind=kind, what="the store")
    if kind == "range":
        assert not clipped(statistics, action).any()
    beyond = ((action < statistics.action_low) | (action > statistics.action_high)).sum(0)
    assert (clipped(statistics, action) <= beyond).all()
    assert (beyond <= 2 * np.ceil(0.01 * len(action))).all()


@given(st.integers(200, 400), st.integers(0, 2**30))
def test_quantiles_are_those_of_all_values_together(rows, seed):
    values = np.random.default_rng(seed).standard_t(2, (rows, 1)).astype("f4")
    made = fit(state(2), values, "quantile").statistics
    ordered, place = np.sort(values[:, 0].astype("f8")), 0.01 * (rows - 1)
    i = int(place)
    low = ordered[i] + (place - i) * (ordered[i + 1] - ordered[i])
    high = -(-ordered[::-1][i] - (place - i) * (ordered[::-1][i + 1] - ordered[::-1][i]))
    np.testing.assert_allclose([made.action_low[0], made.action_high[0]], [low, high], rtol=1e-5)


@pytest.mark.parametrize(("column", "expected", "why"), [
    (np.where(np.arange(1000) == 7, 0.08, 0.0), (0, 0.08), "it has 2 different values"),
    (np.repeat([-1, 0, 1], [5, 990, 5]), (-1, 1), "it has 3 different values"),
    # open in 5 of 1000 steps, on the way there in 40: nearly always closed
    (np.concatenate([np.zeros(995), np.linspace(0.01, 0.08, 5)]), (0, 0.08), "it has 6 different values"),
    (np.concatenate([np.zeros(970), np.linspace(0.01, 0.08, 30)]), None, None),
    (np.concatenate([np.zeros(9950), np.linspace(0.01, 0.08, 50)]), (0, 0.08), "its 1% and 99% quantiles are equal"),
    (np.full(50, 3.0), (3, 3), None),
    (np.concatenate([np.linspace(-1, 1, 2001), [65535]]), (-0.98, 0.98), None),
])
def test_rare_values_that_matter_do_not_vanish_and_faulty_ones_do(column, expected, why):
    made = fit(state(2), column[:, None].astype("f4"), "quantile")
    assert made.full == ({0: why} if why else {})
    if expected is not None:
        assert (made.statistics.action_low[0], made.statistics.action_high[0]) == pytest.approx(expected, abs=2e-3)
    assert LEVELS == 16


def test_what_is_beyond_a_given_range_is_named_and_counted():
    statistics = fit(state(2), np.linspace(-1, 1, 101, dtype="f4")[:, None], "range").statistics
    action = np.zeros((200, 1), "f4")
    action[:2], action[2:4] = 1.5, -1.5
    assert clipped(statistics, action).tolist() == [4]
    check_range(statistics, action, "u", kind="quantile", what="the store")
    with pytest.raises(UserError, match=r"u goes from -1\.5 to 1\.5, and 4 of its 200 values .* \[-1, 1\]"):
        check_range(statistics, action, "u", kind="range", what="the store")
    action[:3] = 1.5
    with pytest.raises(UserError, match=r"4 of its 200 values lie outside the range of the store"):
        check_range(statistics, action, "u", kind="quantile", what="the store")


@given(arrays(np.float32, (4, 3), elements=NUMBERS))
def test_a_fingerprint_is_that_of_the_exact_values(values):
    made = Statistics(action_low=values[0], action_high=values[1], proprio_mean=values[2], proprio_std=values[3])
    written = json.loads(json.dumps(made.to_dict()))
    assert Statistics.from_dict(written).fingerprint == made.fingerprint == written["fingerprint"]
    assert len(made.fingerprint) == 12
    nudged = Statistics(**{**vars(made), "proprio_mean": np.nextafter(values[2], np.float32(np.inf))})
    assert not made.same_as(nudged)
    with pytest.raises(UserError, match=r"statistics have changed since they were written"):
        Statistics.from_dict({**written, "action_low": (values[0] + np.abs(values[0]) + 1).tolist()})
    old = {key: value for key, value in written.items() if key != "fingerprint"}
    assert Statistics.from_dict(old).same_as(made)  # of a store without one
