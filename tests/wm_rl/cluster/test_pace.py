from hypothesis import given
from hypothesis import strategies as st

from wm_rl.cluster.pace import Pace


def pace(**changes):
    return Pace(**{"ratio": 0.5, "max_lag": 10.0, "rows": 8, "slack": 4, "collected": 0, "version": 0,
                   "allowed_rows": 8} | changes)


@given(ratio=st.floats(0.1, 10), arrivals=st.lists(st.lists(st.floats(0, 30), max_size=6), max_size=30))
def test_updates_never_outrun_what_was_collected_and_collectors_are_never_far_ahead(ratio, arrivals):
    one, version = pace(ratio=ratio), 0
    for lags in arrivals:
        if one.limit == 0:
            assert one.collected - version / ratio > one.slack
            lags = []
        one.arrived(lags, version)
        version += one.updates_allowed(version)
        assert 0 <= version <= ratio * one.collected + 1e-6
        assert one.updates_allowed(version) == 0
        one.arrived([], version)
        assert one.limit >= 1 or one.collected - version / ratio > one.slack
        assert one.limit <= one.rows


def test_too_much_lag_halves_the_rows_and_little_of_it_gives_them_back():
    one = pace(ratio=float("inf"))
    seen = []
    for lags in ([4], [40] * 4, [40], [40], [40], [1], [1], [1], [1] * 9):
        one.arrived(lags, 0)
        seen.append(one.limit)
    assert seen == [8, 4, 2, 1, 1, 2, 3, 4, 5]


def test_without_a_ratio_neither_side_waits():
    one = pace(ratio=float("inf"), collected=1000)
    assert one.limit == 8
    assert one.updates_allowed(10**6) > 10**6
