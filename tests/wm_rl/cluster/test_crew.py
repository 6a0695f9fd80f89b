"""How often an actor may die. What needs a cluster is in ``test_driver.py``."""

import time

import pytest

from data.types import UserError
from wm_rl.cluster.crew import Crew, Member


def crew(said, **settings):
    return Crew(**{"patience": 1.0, "max_restarts": 2, "say": said.append} | settings)


def test_it_stops_when_one_actor_dies_too_often_within_an_hour(monkeypatch):
    said, clock = [], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one, other = Member("the writer", None, lambda _: None), Member("collector 0", None, lambda _: None)
    team = crew(said)
    team.members = [one, other]
    for minute in (0, 40, 61, 101, 122):  # never three within an hour
        clock[0] = 60.0 * minute
        team._gone(one, "died")
        team._gone(other, "died") if minute in (0, 122) else None
    assert said[-2:] == ["the writer: died; replaced (5)", "collector 0: died; replaced (2)"]
    assert team.restarts == 7
    clock[0] = 60.0 * 160
    with pytest.raises(UserError, match="the writer was replaced 2 times within an hour, and failed again"):
        team._gone(one, "died")
