import errno
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
import zarr

from data.budget import StoreConfig
from data.layout import SCHEMA_VERSION, field_table
from data.sampler import StepSampler
from data.store import ReplayStore
from data.types import Behaviour, Source, Success, UserError


def listing(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_trajectories_come_back_bit_for_bit(tmp_path, make_store, make_trajectory, assert_same):
    given = [make_trajectory(0, 6), make_trajectory(1, 1, source=Source.REAL, success=Success.UNKNOWN),
             make_trajectory(2, 9, behaviour=Behaviour.UNKNOWN, terminated=False, source=Source.IMAGINED,
                             world_model_version=4, provenance={"a": [1, {"b": None}]})]
    store = make_store(tmp_path / "s", given[:2], given[2:])
    for reader in (store, ReplayStore.open(tmp_path / "s")):
        assert len(reader) == 3
        assert sum(reader.position.values()) == 3
        for index, trajectory in enumerate(given):
            assert_same(reader.trajectory(index), trajectory)
        assert reader.episodes.length.tolist() == [6, 1, 9]
        assert reader.episodes.policy_version.tolist() == [t.policy_version.max() for t in given]
        assert reader.episodes.world_model_version.tolist() == [-1, -1, 4]
        assert reader.provenance(2) == {"a": [1, {"b": None}]}


def test_episodes_are_in_order_of_commit_whichever_segment_holds_them(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s")
    other = ReplayStore.open(tmp_path / "s")
    for seed in range(6):
        (store, other)[seed % 2].append([make_trajectory(seed, source=(Source.SIM, Source.REAL)[seed // 2 % 2])])
    for reader in (store, other, ReplayStore.open(tmp_path / "s")):
        reader.refresh()
        assert [reader.provenance(i)["seed"] for i in range(6)] == list(range(6))


def test_spec_and_statistics_survive(tmp_path, make_store, spec, statistics):
    make_store(tmp_path / "s")
    store = ReplayStore.open(tmp_path / "s")
    assert store.spec == spec
    assert store.statistics.same_as(statistics)
    assert store.embodiment == "arm"
    assert len(store) == 0
    assert store.summary() == []


def test_any_zarr_reader_opens_a_sealed_segment(tmp_path, make_store, make_trajectory, spec):
    given = [make_trajectory(0, 20), make_trajectory(1, 3)]
    store = make_store(tmp_path / "s", given)
    store.seal()
    group = zarr.open_group(tmp_path / "s", mode="r")["seg"][store.episodes.segment[0]]
    fields = field_table(spec)
    assert set(group.array_keys()) == {*fields, "episode", "crc32c", "provenance"}
    for name in fields:
        assert group[name].metadata.dimension_names[0] == "time"
        read = np.concatenate([store.column(0, name), store.column(1, name)])
        np.testing.assert_array_equal(group[name][:], read)
        assert group[name].dtype == read.dtype
    np.testing.assert_array_equal(group["rgb_wrist"][21:], given[1].frames["wrist"])
    np.testing.assert_array_equal(group["action"][:20], given[0].action)
    assert group["episode"][:, 0].tolist() == [0, 21]
    assert group["episode"][:, 1].tolist() == [20, 3]
    assert group.attrs["episode_columns"][:2] == ["start", "length"]
    assert group.attrs["instruction"] == ["push 0", "push 1"]
    # The row of the final observation has no action.
    assert group["action_token"][20].tolist() == [-1, -1, -1]
    assert np.isnan(group["log_prob"][20]).all()
    root = zarr.open_group(tmp_path / "s", mode="r").attrs
    assert root["schema_version"] == SCHEMA_VERSION
    assert root["spec"]["action_names"] == ["u", "v", "w"]


class FullDisk:
    """``pwrite`` on a disk that is full from the middle of one call on."""

    def __init__(self, call):
        self.left, self.real = call, os.pwrite

    def __call__(self, descriptor, content, offset):
        self.left -= 1
        if self.left < 0:
            if self.left == -1:
                self.real(descriptor, bytes(content)[: len(content) // 2], offset)
            raise OSError(errno.ENOSPC, "full")
        return self.real(descriptor, content, offset)


def test_an_append_that_fails_leaves_nothing_visible(tmp_path, make_store, make_trajectory, monkeypatch, assert_same):
    store = make_store(tmp_path / "s", [make_trajectory(0)])
    for call in range(16):  # eleven small columns, two cameras of two episodes, and the journal
        monkeypatch.setattr(os, "pwrite", FullDisk(call))
        with pytest.raises(UserError, match=r"no space left for [^\n]*: nothing of this append was stored"):
            store.append([make_trajectory(1), make_trajectory(2)])
        monkeypatch.undo()
        for reader in (store, ReplayStore.open(tmp_path / "s")):
            reader.refresh()
            assert len(reader) == 1
    store.append([make_trajectory(2)])
    for reader in (store, ReplayStore.open(tmp_path / "s")):
        assert_same(reader.trajectory(0), make_trajectory(0))
        assert_same(reader.trajectory(len(reader) - 1), make_trajectory(2))


def test_a_damaged_segment_is_named_and_not_read_as_zeros(tmp_path, make_store, make_trajectory):
    make_store(tmp_path / "s", [make_trajectory(0)]).close()
    (tmp_path / "s/seg/00000000/rgb_front/c.0.0.0.0").unlink()
    with pytest.raises(UserError, match=r"damaged segment: .*rgb_front.* found 0"):
        ReplayStore.open(tmp_path / "s")


def test_another_schema_version_is_refused_and_untouched(tmp_path, make_store, make_trajectory):
    make_store(tmp_path / "s", [make_trajectory(0)])
    file = tmp_path / "s/zarr.json"
    metadata = json.loads(file.read_text())
    metadata["attributes"]["schema_version"] = 7
    file.write_text(json.dumps(metadata))
    before = listing(tmp_path / "s")
    with pytest.raises(UserError, match=f"schema version 7, this code reads version {SCHEMA_VERSION}") as error:
        ReplayStore.open(tmp_path / "s")
    assert "\n" not in str(error.value)
    assert listing(tmp_path / "s") == before


def test_what_is_no_store_is_refused(tmp_path, make_store, make_trajectory):
    with pytest.raises(UserError, match="found nothing"):
        ReplayStore.open(tmp_path / "s")
    assert not (tmp_path / "s").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/zarr.json").write_text("{")
    with pytest.raises(UserError, match="found another folder"):
        ReplayStore.open(tmp_path / "other")
    make_store(tmp_path / "s", [make_trajectory(0)])
    before = listing(tmp_path / "s")
    with pytest.raises(UserError, match="exists already"):
        make_store(tmp_path / "s")
    assert listing(tmp_path / "s") == before


def test_trajectories_that_do_not_fit_are_refused(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s")
    with pytest.raises(UserError, match="holds embodiment 'arm', got a trajectory of 'leg'"):
        store.append([make_trajectory(0), make_trajectory(1, embodiment="leg")])
    bad = [make_trajectory(0, cameras=("front",)), make_trajectory(0, size=4),
           make_trajectory(0, action=np.zeros((6, 2), "f4")), make_trajectory(0, proprio=np.zeros((7, 2))),
           make_trajectory(0, reward=np.full(6, np.nan, "f4")),
           make_trajectory(0, log_prob=np.full((6, 3), np.nan, "f4"))]
    for trajectory in bad:
        with pytest.raises(ValueError, match=r"expected|finite|log_prob"):
            store.append([trajectory])
    assert len(store) == 0
    assert store.position == {}


def test_rollback_hides_and_loses_nothing(tmp_path, make_store, make_trajectory, assert_same):
    given = [make_trajectory(i, behaviour=Behaviour.UNKNOWN) for i in range(5)]
    store = make_store(tmp_path / "s", given[:1])
    early = store.position
    store.append(given[1:3])
    late = store.position
    assert (early, late) == ({"00000000": 1}, {"00000000": 3})
    store.seal()
    label(store, "00000000", 5)
    store.append(given[3:4])
    before = listing(tmp_path / "s")
    assert store.rollback(late) == ["00000001"]
    assert store.rollback(early) == ["00000000"]
    assert store.position == early
    after = listing(tmp_path / "s")
    for name, content in before.items():
        if not name.startswith("open"):  # which was sealed
            assert after[name] == content
    store.append([given[4]])
    assert store.position == {"00000000": 1, "00000002": 1}
    for reader in (store, ReplayStore.open(tmp_path / "s")):
        assert len(reader) == 2
        assert_same(reader.trajectory(1), given[4])
    with pytest.raises(UserError, match="written with 3 episodes in segment 00000000"):
        store.rollback(late)
    assert store.rollback({}) == ["00000000", "00000002"]
    assert store.rollback({}) == []
    assert len(ReplayStore.open(tmp_path / "s")) == 0


def test_a_rollback_under_another_writer_is_refused(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0)])
    other = ReplayStore.open(tmp_path / "s")
    with pytest.raises(UserError, match="another process is writing segment 00000000"):
        other.rollback({})
    store.close()
    assert other.rollback({}) == ["00000000"]


def label(store, segment, seed, **changes):
    rng = np.random.default_rng(seed)
    rows = next(s for s in store.segments if s.name == segment).rows
    values = {"action_token": rng.integers(0, 11, (rows, 3)).astype("i2"),
              "log_prob": -rng.random((rows, 3)).astype("f4"), "decision": np.arange(rows) % 3 == 0, "model": "clone"}
    store.label_behaviour(segment, **(values | changes))
    return values | changes


def test_label_behaviour_overlays_unknown_episodes_only(tmp_path, make_store, make_trajectory, assert_same):
    given = [make_trajectory(0, 4), make_trajectory(1, 5, behaviour=Behaviour.UNKNOWN)]
    store = make_store(tmp_path / "s", given)
    with pytest.raises(UserError, match=r"segment 00000000 of .* is still being written"):
        label(store, "00000000", 5)
    store.seal()
    sealed = listing(tmp_path / "s/seg")
    other = ReplayStore.open(tmp_path / "s")
    values = label(store, "00000000", 5)
    other.refresh()
    for reader in (store, other, ReplayStore.open(tmp_path / "s")):
        assert_same(reader.trajectory(0), given[0])
        cloned = reader.trajectory(1)
        assert cloned.behaviour is Behaviour.CLONED
        for name in ("action_token", "log_prob", "decision"):
            np.testing.assert_array_equal(getattr(cloned, name), values[name][5:10])
        np.testing.assert_array_equal(cloned.action, given[1].action)
        assert np.isnan(reader.column(1, "log_prob")[5]).all()
        assert reader.episodes.behaviour.tolist() == ["logged", "cloned"]
    assert listing(tmp_path / "s/seg") == sealed
    assert zarr.open_group(tmp_path / "s/cloned/00000000", mode="r").attrs["model"] == "clone"

    again = label(store, "00000000", 6)
    np.testing.assert_array_equal(store.trajectory(1).log_prob, again["log_prob"][5:10])
    assert (tmp_path / "s/superseded/0/00000000/log_prob/zarr.json").exists()
    other.refresh()
    np.testing.assert_array_equal(other.trajectory(1).log_prob, again["log_prob"][5:10])


def test_a_label_that_does_not_cover_the_segment_is_refused(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(1, 5, behaviour=Behaviour.UNKNOWN)])
    store.seal()
    with pytest.raises(ValueError, match="without a finite log_prob"):
        label(store, "00000000", 0, log_prob=np.full((6, 3), np.nan, "f4"))
    with pytest.raises(ValueError, match=r"decision has shape \(5,\), expected \(6,\)"):
        label(store, "00000000", 0, decision=np.ones(5, bool))
    assert ReplayStore.open(tmp_path / "s").episodes.behaviour.tolist() == ["unknown"]


def test_what_a_rollback_hides_needs_no_label(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0, 5, behaviour=Behaviour.UNKNOWN)])
    position = store.position
    store.append([make_trajectory(1, 4, behaviour=Behaviour.UNKNOWN)])
    store.seal()
    log_prob = np.full((6 + 5, 3), -0.5, "f4")
    log_prob[6:] = np.nan
    with pytest.raises(ValueError, match="without a finite log_prob"):
        label(store, "00000000", 0, log_prob=log_prob)
    assert store.rollback(position) == ["00000000"]
    label(store, "00000000", 0, log_prob=log_prob)
    assert store.episodes.behaviour.tolist() == ["cloned"]
    np.testing.assert_array_equal(ReplayStore.open(tmp_path / "s").trajectory(0).log_prob, log_prob[:5])


def test_damaged_estimates_are_named(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(1, 5, behaviour=Behaviour.UNKNOWN)])
    store.seal()
    label(store, "00000000", 5)
    (tmp_path / "s/cloned/00000000/log_prob/c.0.0").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged estimates: .*log_prob.* found 0"):
        ReplayStore.open(tmp_path / "s")


def test_an_eviction_takes_its_episodes_only_and_plans_keep_theirs(tmp_path, spec, statistics, make_trajectory):
    config = StoreConfig(segment_bytes=1, budget_bytes=3 * 2**20 + 40_000)
    with ReplayStore.create(tmp_path / "s", spec=spec, statistics=statistics, embodiment="arm", config=config) as store:
        reader = ReplayStore.open(tmp_path / "s")
        for i in range(3):
            store.append([make_trajectory(i)])
        reader.refresh()
        sampler = StepSampler(reader, sources={"sim": 1}, context=1, horizon=3, seed=0)
        plan = sampler.plan(0, 16)
        expected = sampler.read(plan)
        kept = {segment.name: segment for segment in reader.segments}
        while store.provenance(0)["seed"] == 0:
            store.append([make_trajectory(len(store) + 1)])
            store.refresh()
        reader.refresh()
        assert [reader.provenance(i) for i in range(len(reader))] == [store.provenance(i) for i in range(len(store))]
        assert any(segment is kept.get(segment.name) for segment in reader.segments)
        assert torch.equal(sampler.read(plan).proprio, expected.proprio)
        assert store.used_bytes() <= config.budget_bytes


def test_refresh_sees_other_writers_and_only_changes_count(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0)])
    other = ReplayStore.open(tmp_path / "s")
    generation = other.generation
    other.refresh()
    assert other.generation == generation
    store.append([make_trajectory(1), make_trajectory(2)])
    assert len(other) == 1
    other.refresh()
    assert len(other) == 3
    assert other.generation > generation
    store.rollback({"00000000": 1})
    other.refresh()
    assert len(other) == 1


def append_many(path, make, first):
    store = ReplayStore.open(path)
    for i in range(10):
        store.append([make(first + i, 2)])


def test_two_processes_lose_no_append(tmp_path, make_store, make_trajectory):
    make_store(tmp_path / "s")
    context = multiprocessing.get_context("fork")  # children only touch files
    writers = [context.Process(target=append_many, args=(tmp_path / "s", make_trajectory, 100 * i)) for i in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = ReplayStore.open(tmp_path / "s")
    assert sorted(store.provenance(i)["seed"] for i in range(len(store))) == [*range(10), *range(100, 110)]
    assert sorted(store.position.values()) == [10, 10]


def test_summary_counts_by_source_task_behaviour_success(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0, 4), make_trajectory(1, 5)],
                       [make_trajectory(2, 3, source=Source.REAL, behaviour=Behaviour.UNKNOWN, task="lift")])
    assert store.summary() == [
        {"source": "real", "task": "lift", "behaviour": "unknown", "success": "yes", "episodes": 1, "steps": 3},
        {"source": "sim", "task": "push", "behaviour": "logged", "success": "yes", "episodes": 2, "steps": 9},
    ]
