"""When imagination pauses, and which logs updates draw. (The whole loop is tested in tests/integration.)"""

import dataclasses
from types import SimpleNamespace

import pytest

from data.outcome_labels import OutcomeLabel, write_labels
from data.store import ReplayStore
from data.types import Source, Success
from tests import examples
from wm_rl.improve import imagine
from wm_rl.loop import Loop
from world_model.config import ImaginationConfig


class Store(list):
    def refresh(self):
        pass


class Audited:
    """A fake world model: what its audits claim is scripted; it notes when it is asked to imagine."""

    def __init__(self, claims):
        self.claims, self.audits, self.imagined = list(claims), 0, 0

    def audit(self, store, config, *, episodes):
        assert list(episodes) == [8, 9]  # the two newest of ten
        self.audits += 1
        imagined, recorded = self.claims.pop(0)
        return {"audit/imagined_successes": imagined, "audit/recorded_successes": recorded}

    def imagination(self, store, config, *, num_envs):
        self.imagined += 1
        return SimpleNamespace(num_envs=num_envs)


def scripted(claims):
    loop = Loop.__new__(Loop)
    loop.config = SimpleNamespace(refit_every=100, branches_per_iteration=3)
    loop.imagination_config = ImaginationConfig(max_ratio=2.0, audit_every=4)
    loop.progress = {"seconds": {}, "drift": {"imagined": 0.0, "recorded": 0.0}}
    loop.world_model = Audited(claims)
    loop.roll = lambda *given: []
    return loop


def test_it_pauses_while_imagination_claims_too_much_and_audits_every_iteration_until_it_does_not():
    loop = scripted([(1, 1), (12, 1), (0, 1), (0, 9)])
    seen = []
    for iteration in range(8):
        try:
            metrics = imagine(loop, None, Store(range(10)), iteration, newest=2)
        except ZeroDivisionError:  # no imagined episode to average over
            metrics = {"imagination_paused": 0.0}
        seen.append((metrics["imagination_paused"], loop.world_model.audits, loop.world_model.imagined))
    # audits in 0 and 4; the second finds 12.7 claims where 1.7 were recorded; 5 and 6 audit again, 6 finds it well
    assert seen == [(0, 1, 1), (0, 1, 2), (0, 1, 3), (0, 1, 4), (1, 2, 4), (1, 3, 4), (0, 4, 5), (0, 4, 6)]
    assert loop.progress["drift"]["recorded"] == pytest.approx(((1 * 0.7 + 1) * 0.7 + 1) * 0.7 + 9)


def test_the_first_imagination_always_runs():
    loop = scripted([(20, 0)])
    with pytest.raises(ZeroDivisionError):
        imagine(loop, None, Store(range(10)), 0, newest=2)
    assert loop.world_model.imagined == 1


def test_an_audit_comes_before_the_refit_that_sees_its_episodes():
    loop, order = scripted([(1, 1)] * 2), []
    loop.config.refit_every = 4
    loop.world_model_config = SimpleNamespace(round_steps=5)
    loop.fit_world_model = lambda steps, title: order.append("refit")
    audit = loop.world_model.audit
    loop.world_model.audit = lambda *given, **named: order.append("audit") or audit(*given, **named)
    for iteration in (0, 4):
        with pytest.raises(ZeroDivisionError):
            imagine(loop, None, Store(range(10)), iteration, newest=2)
    assert order == ["audit", "audit", "refit"]


def test_logs_without_a_known_success_stay_out_of_the_updates_and_that_is_said(tmp_path):
    store = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    store.append([examples.trajectory(0, 4, Source.SIM), dataclasses.replace(
        examples.trajectory(1, 4, Source.REAL), success=Success.UNKNOWN)])
    store.seal()
    said = []
    loop = Loop.__new__(Loop)
    loop.uses_logs, loop.replay, loop.journal = True, examples.REPLAY, SimpleNamespace(say=said.append)
    assert loop.mixture(store).mix == {"sim": 0.5, "real": 0.0, "imagined": 0.25}
    assert said == ["no log has a known success: updates draw none of them (the world model and the clone do)"]
    write_labels(store.path, str(store.episodes.segment[1]),
                 {0: OutcomeLabel(success=Success.NO, step=-1, probability=0.0)}, {"model": "m"})
    assert loop.mixture(store).mix["real"] == 0
    loop.replay = dataclasses.replace(examples.REPLAY, outcome_labels=True)
    assert loop.mixture(store) == loop.replay
    loop.replay = examples.REPLAY
    store.append([examples.trajectory(3, 4, Source.REAL)])
    assert loop.mixture(store) == examples.REPLAY
    assert len(said) == 2
