"""Standing still is marked, and only that."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.logs.idle import idle_steps
from data.types import Statistics

STATISTICS = Statistics(action_low=np.array([-1, 3], "f4"), action_high=np.array([1, 3], "f4"),
                        proprio_mean=np.zeros(1, "f4"), proprio_std=np.full(1, 0.2, "f4"))


def test_a_pause_of_a_second_is_idle_and_a_slow_motion_is_not():
    place = np.concatenate([np.linspace(0, 1, 20), np.full(16, 1.0), np.linspace(1, 2, 30)])
    action = np.stack([np.zeros(66), np.full(66, 3)], 1).astype("f4")
    made = idle_steps(place[:, None].astype("f4"), action, STATISTICS, 10.0)
    assert made == [(19, 36)]  # rows 19 to 36 hold 1.0
    assert idle_steps(place[:30, None].astype("f4"), action[:30], STATISTICS, 10.0) == [(19, 29)]
    assert idle_steps(place[:29, None].astype("f4"), action[:29], STATISTICS, 10.0) == []  # 0.9 s
    creeping = np.linspace(0, 1, 66)[:, None].astype("f4")  # each step is small, a second is not
    assert idle_steps(creeping, action, STATISTICS, 10.0) == []
    action[25, 0] = 0.5  # a command is no pause: before it are 0.6 s, after it 1 s
    assert idle_steps(place[:, None].astype("f4"), action, STATISTICS, 10.0) == [(26, 36)]
    constant = np.ones((66, 1), "f4")
    action = np.full((66, 2), 3, "f4")
    action[-1] = 9  # belongs to no step
    assert idle_steps(constant, action, STATISTICS, 10.0) == [(0, 65)]
    action[40, 1] += 1e-3  # of a dimension that never moves
    assert idle_steps(constant, action, STATISTICS, 10.0) == [(0, 40), (41, 65)]


@given(st.lists(st.sampled_from([0.0, 0.004, 0.2]), min_size=2, max_size=14), st.integers(1, 5))
def test_it_is_what_its_definition_says(steps, rate):
    place = np.cumsum([0.0, *steps]).astype("f4")
    action = np.tile(np.array([0, 3], "f4"), (len(place), 1))
    marked = np.zeros(len(steps), bool)
    for first, last in idle_steps(place[:, None], action, STATISTICS, float(rate)):
        marked[first:last] = True
    expected = np.zeros(len(steps), bool)
    for first in range(len(place) - rate):
        if float(place[first + rate]) - float(place[first]) <= 0.01 * 5 * float(np.float32(0.2)):
            expected[first : first + rate] = True
    assert marked.tolist() == expected.tolist()
