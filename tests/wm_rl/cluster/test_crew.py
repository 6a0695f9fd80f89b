"""How often an actor may die. What needs a cluster is in ``test_driver.py``."""

import asyncio
import time

import pytest
import ray
from ray.exceptions import ActorDiedError

from data.types import UserError
from tests import examples
from wm_rl.cluster.crew import Actor, Crew, Member, Replaced, _Call
from wm_rl.cluster.inference import InferenceServer


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


def test_answers_of_one_method_are_dealt_with_in_the_order_of_the_calls(monkeypatch):
    shown, dealt = [], []
    monkeypatch.setattr(ray, "wait", lambda pending, num_returns, timeout: (shown[:num_returns], []))
    monkeypatch.setattr(ray, "get", str.upper)
    learner, server = Member("the learner", None, lambda _: None), Member("a server", None, lambda _: None)
    members = {"first": learner, "second": learner, "third": learner, "other": server}
    team = crew([])
    team._pending = {name: _Call(member, "update", dealt.append, float("inf")) for name, member in members.items()}
    shown[:] = ["third", "other"]  # Ray saw the answer to the third call before that to the first
    team.attend(0.0)
    assert dealt == ["OTHER"]
    shown[:] = ["third", "second", "first"]
    team.attend(0.0)
    assert dealt == ["OTHER", "FIRST", "SECOND", "THIRD"]
    assert not team._pending


def test_nothing_more_is_dealt_with_of_an_actor_that_is_gone(monkeypatch):
    dealt = []
    monkeypatch.setattr(ray, "wait", lambda pending, num_returns, timeout: (["first", "second"], []))

    def die(reference):
        raise ActorDiedError if reference == "first" else AssertionError

    monkeypatch.setattr(ray, "get", die)
    team, learner = crew([]), Member("the learner", None, lambda _: None, up=True)
    team._pending = {name: _Call(learner, "update", dealt.append, float("inf")) for name in ("first", "second")}
    team.attend(0.0)
    assert (dealt, learner.restarts, learner.up, team._pending) == ([], 1, False, {})


def test_a_question_is_for_one_actor_and_not_for_its_successor():
    class Counter(Actor):
        def add(self, one, other):
            return one + other

    actor = Counter()
    process, born = who = actor.ready()
    assert actor.do(who, "add", 1, 2) == 3
    for other in ((process + 1, born), (process, born - 1)):
        with pytest.raises(Replaced):
            actor.do(other, "add", 1, 2)


def test_so_it_is_for_an_actor_that_answers_many_at_a_time():
    async def main():
        server = InferenceServer(examples.policy, batch_size=1, max_age=0.0)
        who = server.ready()
        await server.do(who, "load", examples.policy().state_dict(), 3)
        assert (await server.do(who, "report"))["version"] == 3
        with pytest.raises(Replaced):
            await server.do((0, 0), "load", {}, 4)

    asyncio.run(main())
