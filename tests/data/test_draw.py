import collections

import numpy as np
import pytest
import torch

from data.draw import EpisodeDraw, Limits
from data.prefetch import prefetch
from data.sampler import DecisionSampler, ReplayConfig, StepSampler
from data.store import ReplayStore
from data.types import NOT_OURS, Behaviour, Source, Success, UserError

ALL = {"sim": None, "real": None, "imagined": None}


def everything(table):
    return np.ones(len(table))


def drawn(draw, source=Source.SIM, times=2000, **state):
    draw.update(**state)
    return collections.Counter(draw.draw(np.random.default_rng(0), source, times).tolist())


@pytest.fixture
def store(tmp_path, make_store, make_trajectory):
    """Simulated episodes 0-9 of versions 0-9 in two tasks, and two logged by a human."""
    sim = [make_trajectory(i, 4, policy_version=np.full(4, i), task=f"task {i % 2}",
                           success=Success.YES if i % 2 else Success.NO) for i in range(10)]
    human = [make_trajectory(i, 4, source=Source.REAL, policy_version=np.full(4, NOT_OURS)) for i in (10, 11)]
    return make_store(tmp_path / "s", sim, human)


def test_capacity_lag_and_age_leave_out_what_is_stale(store):
    assert set(drawn(EpisodeDraw(store, Limits(capacity={"sim": 3}), everything))) == {7, 8, 9}
    lagging = EpisodeDraw(store, Limits(max_lag=4), everything)
    assert set(drawn(lagging, version=5)) == set(range(1, 10))
    assert set(drawn(lagging, version=11)) == {7, 8, 9}
    assert set(drawn(lagging, version=5)) == set(range(1, 10))  # an earlier version, as after a resume
    assert set(drawn(lagging, Source.REAL, version=900)) == {10, 11}
    lagging.update(version=900)
    assert not lagging.any(Source.SIM)
    commit = store.episodes.code("commit_time")
    aging = EpisodeDraw(store, Limits(max_age=5.0), everything)
    assert set(drawn(aging, now=commit[4] / 1e9)) == set(range(10))
    assert not drawn_any(aging, commit[9] / 1e9 + 6)
    with pytest.raises(UserError, match=r"max_lag needs the version"):
        lagging.update()
    with pytest.raises(UserError, match=r"max_age needs the time"):
        aging.update()


def drawn_any(draw, now):
    draw.update(now=now)
    return draw.any(Source.SIM)


def test_failures_draw_weak_tasks_more_often(store):
    counts = drawn(EpisodeDraw(store, Limits(task_weights="failures"), everything), times=8000)
    failed, solved = (sum(counts[i] for i in range(first, 10, 2)) for first in (0, 1))
    # 5 of 5 failed and 0 of 5: 1 + 100 * 6 / 7 against 1 + 100 / 7.
    assert failed / solved == pytest.approx((1 + 600 / 7) / (1 + 100 / 7), rel=0.1)


def test_an_unknown_outcome_is_no_failure(store, make_trajectory):
    unknown = [make_trajectory(30 + i, 4, policy_version=np.full(4, i), task="task 1", success=Success.UNKNOWN)
               for i in range(5)]
    store.append(unknown)
    counts = drawn(EpisodeDraw(store, Limits(task_weights="failures"), everything), times=8000)
    failed = sum(counts[i] for i in range(0, 10, 2))
    # As in the test above: task 1 has 0 failures of 5 that are known.
    assert failed / (8000 - failed) == pytest.approx((1 + 600 / 7) / (1 + 100 / 7), rel=0.1)


def test_priorities_weigh_and_new_episodes_get_the_largest(store, make_trajectory):
    draw = EpisodeDraw(store, Limits(capacity={"sim": 10}), everything, priority_exponent=0.5)
    draw.update()
    draw.set_priority(np.arange(10), np.array([9.0] + [1.0] * 9))
    counts = drawn(draw, times=12000)
    assert counts[0] / 12000 == pytest.approx(3 / 12, abs=0.02)
    store.append([make_trajectory(20, 4)])  # the oldest leaves; the new one has priority 9
    counts = drawn(draw, times=12000)
    assert counts[0] == 0
    assert counts[12] / 12000 == pytest.approx(3 / 12, abs=0.02)
    draw.set_priority(np.array([0]), np.array([100.0]))  # it has expired and stays so
    assert drawn(draw)[0] == 0


def test_growing_and_reading_at_once_draw_alike(tmp_path, make_store, make_trajectory):
    """What a sampler that saw the store grow draws is what one that opens it now does: batches survive a restart."""
    store = make_store(tmp_path / "s")
    config = ReplayConfig(windows=6, decisions=2, discount=0.9, mix={"sim": 2, "real": 1, "imagined": 0}, capacity={
        **ALL, "sim": 7}, max_lag=12, task_weights="failures")
    grown = DecisionSampler(store, config, chunk=2, seed=4)
    for i in range(12):
        source = Source.REAL if i % 3 == 0 else Source.SIM
        store.append([make_trajectory(i, 5, source=source, policy_version=np.full(5, i), task=f"t{i % 4}",
                                      success=Success.YES if i % 5 else Success.NO)])
        if i > 2:
            anew = DecisionSampler(ReplayStore.open(store.path), config, chunk=2, seed=4)
            a, b = (sampler.sample(i, version=i) for sampler in (grown, anew))
            assert torch.equal(a.proprio, b.proprio)
            assert a.instruction == b.instruction


def test_reading_ahead_changes_nothing(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(i, 6) for i in range(5)])
    steps = StepSampler(store, sources={"sim": 1}, context=2, horizon=3, seed=0)
    plans = (steps.plan(i, 4) for i in range(7))
    for i, batch in enumerate(prefetch(steps, plans, lambda: steps.buffers(4, pin=False), depth=2)):
        expected = steps.sample(i, 4)
        assert all(torch.equal(batch.frames[c], expected.frames[c]) for c in store.spec.cameras)
        assert torch.equal(batch.action, expected.action)
    config = ReplayConfig(windows=6, decisions=2, discount=0.9, mix={"sim": 1, "real": 0, "imagined": 0}, capacity=ALL)
    decisions = DecisionSampler(store, config, chunk=2, seed=4)
    plans = (decisions.plan(i, rank=1, world_size=2) for i in range(5))
    for i, batch in enumerate(prefetch(decisions, plans, lambda: decisions.buffers(pin=False))):
        if i == 2:
            store.append([make_trajectory(9, 6, behaviour=Behaviour.UNKNOWN)])  # what is planned does not move
        expected = decisions.sample(i, rank=1, world_size=2)
        for c in store.spec.cameras:
            assert torch.equal(batch.frames[c], expected.frames[c])
            assert torch.equal(batch.final_frames[c], expected.final_frames[c])


def test_bad_limits_are_one_line():
    with pytest.raises(UserError, match=r"task_weights: expected uniform or failures, got 'fails'"):
        Limits(task_weights="fails")
    with pytest.raises(UserError, match=r"replay.max_lag: expected 0 or more, or null, got -1"):
        Limits(max_lag=-1)
