"""Outcomes that a model gave: beside the recording, seen only by who asks, taken back when asked."""

import dataclasses
import json

import numpy as np
import pytest

from data.budget import Evicted, StoreConfig, make_room, used_bytes
from data.outcome_labels import FOLDER, OutcomeLabel, revoke_labels, write_labels
from data.sampler import DecisionSampler, has_outcomes
from data.store import ReplayStore
from data.types import Behaviour, Source, Success, UserError
from data.verify import verify
from tests import examples

RULE = {"model": "abc", "threshold": 0.5, "success_frames": 2}
REPLAY = dataclasses.replace(examples.REPLAY, windows=12, decisions=3, mix={"sim": 0.0, "real": 1.0, "imagined": 0.0})


def log(seed, steps=8, success=Success.UNKNOWN):
    """An odd seed's trajectory pays nothing and is truncated; its decisions are known."""
    t = examples.trajectory(2 * seed + 1, steps, Source.REAL)
    return dataclasses.replace(t, success=success, policy_version=np.full(steps, -1))


@pytest.fixture
def store(tmp_path):
    """Two episodes without a label, a failure, a success at its last step."""
    replay = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    replay.append([log(0), log(1), log(2, success=Success.NO), examples.trajectory(4, 8, Source.REAL)])
    replay.seal()
    return replay


def label(store, labels):
    (segment,) = set(store.episodes.segment.tolist())
    write_labels(store.path, segment, labels, RULE)


def yes(step):
    return OutcomeLabel(success=Success.YES, step=step, probability=0.9)


NO = OutcomeLabel(success=Success.NO, step=-1, probability=0.1)


def test_only_who_asks_sees_them_and_the_recording_stays_as_it_was(store):
    before = [store.trajectory(i) for i in range(4)]
    label(store, {0: yes(3), 1: NO, 2: yes(1), 3: NO})  # the last two have a label, which stays
    store.refresh()
    assert store.episodes.success.tolist() == ["unknown", "unknown", "no", "yes"]
    seen = store.with_outcome_labels()
    assert seen.episodes.success.tolist() == ["yes", "no", "no", "yes"]
    t = seen.trajectory(0)
    assert t.success is Success.YES
    assert t.reward.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert t.terminated.tolist() == [False, False, False, True, False, False, False, False]
    assert not t.truncated.any()
    assert t.decision.tolist() == [True, False, True, False, False, False, False, False]
    assert seen.episodes.code("decisions").tolist() == [2, 4, 4, 4]
    assert t.provenance["outcome_label"] == {"success": "yes", "probability": 0.9, **RULE}
    assert seen.trajectory(1).truncated[-1]
    for i in (2, 3):
        assert "outcome_label" not in seen.trajectory(i).provenance
        np.testing.assert_array_equal(seen.trajectory(i).reward, before[i].reward)
        np.testing.assert_array_equal(seen.trajectory(i).terminated, before[i].terminated)
    for i, recorded in enumerate(before):
        read = store.trajectory(i)
        np.testing.assert_array_equal(read.reward, recorded.reward)
        np.testing.assert_array_equal(read.decision, recorded.decision)
        assert read.provenance == recorded.provenance


def test_new_labels_replace_old_ones_and_all_can_be_taken_back(store):
    label(store, {0: yes(3), 1: NO})
    seen = store.with_outcome_labels()
    label(store, {0: NO})
    seen.refresh()
    assert seen.episodes.success.tolist() == ["no", "unknown", "no", "yes"]
    assert revoke_labels(store.path) == 1
    seen.refresh()
    assert seen.episodes.success.tolist() == ["unknown", "unknown", "no", "yes"]
    kept = sorted((store.path / "superseded").glob("*/outcome-*.json"))
    assert [sorted(json.loads(file.read_text())["labels"]) for file in kept] == [["0", "1"], ["0"]]
    assert revoke_labels(store.path) == 0


def test_a_policy_learns_from_no_episode_of_unknown_success_unless_labels_are_asked_for(store):
    assert has_outcomes(store, Source.REAL)

    def drawn(**changes):
        sampler = DecisionSampler(store, dataclasses.replace(REPLAY, **changes), chunk=2, seed=0)
        return {int(e) for step in range(6) for e in sampler.plan(step).episodes}, sampler

    assert drawn()[0] == {2, 3}
    label(store, {0: yes(3)})
    assert drawn()[0] == {2, 3}
    episodes, sampler = drawn(outcome_labels=True)
    assert episodes == {0, 2, 3}
    for step in range(6):
        plan = sampler.plan(step)
        batch = sampler.read(plan)
        for row in np.flatnonzero(plan.episodes == 0).tolist():
            assert plan.starts[row] == 0
            assert batch.mask[row].tolist() == [True, True, False]
            assert batch.terminated[row]  # nothing is bootstrapped from what follows
            np.testing.assert_allclose(batch.reward[row], [0, 0.9, 0], atol=1e-6)  # paid at the second of two steps
    revoke_labels(store.path)
    assert {int(e) for step in range(6) for e in sampler.plan(step).episodes} == {2, 3}  # without a refresh by hand


def test_unknown_success_alone_is_an_error_that_says_so(tmp_path):
    replay = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    replay.append([log(0), log(1)])
    assert not has_outcomes(replay, Source.REAL)
    with pytest.raises(UserError, match="2 episodes, none with a known success of source real"):
        DecisionSampler(replay, REPLAY, chunk=2, seed=0).sample(0)


def test_damage_is_one_line_and_the_store_stays_usable(store):
    label(store, {0: yes(8)})  # it has 8 steps, the last is number 7
    with pytest.raises(UserError, match=r"episode 0 has 8 steps, its label names step 8; move the file away, or type"):
        store.with_outcome_labels()
    file = next((store.path / FOLDER).glob("*.json"))
    damaged = file.read_text()[:-9]
    file.write_text(damaged)
    with pytest.raises(UserError, match=r"damaged labels: .* is not readable"):
        store.with_outcome_labels()
    assert [segment.folder for segment in verify(store.path, repair=False).damaged] == [f"outcome/{file.name}"]
    report = verify(store.path, repair=True)
    assert not report.remaining
    assert "label them with python main.py store action=label_success" in report.repaired[0]
    assert [kept.read_text() for kept in (store.path / "control" / "quarantine").glob("outcome-*")
            if kept.suffix != ".json"] == [damaged]
    assert len(store) == len(store.with_outcome_labels()) == 4


def test_a_repair_takes_the_labels_along(store):
    label(store, {0: NO, 1: yes(5)})
    (segment,) = set(store.episodes.segment.tolist())
    column = store.path / "seg" / segment / "proprio" / "c.0.0"
    content = bytearray(column.read_bytes())
    content[3] ^= 1  # in the first episode
    column.write_bytes(content)
    assert not verify(store.path, repair=True).remaining
    seen = ReplayStore.open(store.path).with_outcome_labels()
    assert seen.episodes.success.tolist() == ["yes", "no", "yes"]
    assert seen.trajectory(0).terminated.tolist().index(True) == 5


def test_an_evicted_segment_takes_its_labels_along(tmp_path):
    replay = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    replay.append([log(0)])
    replay.seal()
    label(replay, {0: NO})
    config = StoreConfig(budget_bytes=used_bytes(replay.path), segment_bytes=1, floor_bytes={})
    make_room(replay.path, 100, config, Evicted(replay.path))
    replay.refresh()
    assert len(replay) == 0
    assert list((replay.path / FOLDER).iterdir()) == []


def test_cloned_behaviour_and_labels_together(tmp_path):
    """An unlabelled log: nobody's tokens, no outcome; both estimates lie over it."""
    replay = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    t = dataclasses.replace(examples.trajectory(1, 6, Source.REAL, behaviour=Behaviour.UNKNOWN),
                            success=Success.UNKNOWN)
    replay.append([t])
    replay.seal()
    label(replay, {0: yes(2)})
    (segment,) = set(replay.episodes.segment.tolist())
    replay.label_behaviour(segment, action_token=np.zeros((7, 3), np.int16), log_prob=np.full((7, 3), -1, np.float32),
                           decision=np.array([True, False] * 3 + [False]), model="m")
    read = replay.with_outcome_labels().trajectory(0)
    assert (read.behaviour, read.success) == (Behaviour.CLONED, Success.YES)
    assert read.decision.tolist() == [True, False, True, False, False, False]
    assert replay.trajectory(0).decision.tolist() == [True, False, True, False, True, False]
