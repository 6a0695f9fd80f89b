"""Any order of appends, seals, crashes, recoveries, evictions, rollbacks and labels, against a list in memory."""

import contextlib
import dataclasses
import errno
import os
import shutil
import warnings
from collections import Counter

import numpy as np
import pytest
import zarr
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from data.budget import StoreConfig, make_room
from data.layout import field_table
from data.store import ReplayStore
from data.types import Behaviour, Source, UserError

SEGMENT = 8_000
"""About 17 rows; sealed, a segment takes some 60 kB."""
CONFIG = StoreConfig(segment_bytes=SEGMENT, budget_bytes=2**20 + 400_000,
                     floor_bytes={"real": float("inf"), "imagined": 100_000})


@dataclasses.dataclass
class Kept:
    """What the model knows of an episode."""

    segment: str
    row: int
    trajectory: object
    hidden: bool = False


def tree_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Life(RuleBasedStateMachine):
    """``self.kept`` is every episode that was acknowledged and not evicted, in order of commit."""

    positions = Bundle("positions")

    @initialize()
    def create(self):
        self.path = self.folder / "store"
        shutil.rmtree(self.path, ignore_errors=True)
        ReplayStore.create(self.path, spec=self.spec, statistics=self.statistics, embodiment="arm")
        self.store, self.reader = ReplayStore.open(self.path, CONFIG), ReplayStore.open(self.path)
        self.kept, self.seen, self.counts, self.seed = [], [], Counter(), 0

    def visible(self):
        return [(kept.segment, kept.row, kept.trajectory) for kept in self.kept if not kept.hidden]

    def forget_evicted(self):
        """What the budget removed must be whole, the oldest of its source, above the floor."""
        there = {entry.name for name in ("seg", "open") for entry in os.scandir(self.path / name)}
        names = {}
        for kept in self.kept:
            names.setdefault(kept.trajectory.source, dict.fromkeys([]))[kept.segment] = None
        for source, segments in names.items():
            gone = [name for name in segments if name not in there]
            assert gone == list(segments)[: len(gone)]
            assert not (gone and source is Source.REAL)
            if gone and source is Source.IMAGINED:
                assert sum(tree_bytes(self.path / "seg" / name) for name in segments
                           if (self.path / "seg" / name).exists()) >= 100_000
        self.kept = [kept for kept in self.kept if kept.segment in there]
        assert self.store.used_bytes() <= CONFIG.budget_bytes

    @rule(steps=st.lists(st.integers(1, 16), min_size=1, max_size=6),
          source=st.sampled_from([Source.SIM, Source.SIM, Source.SIM, Source.IMAGINED]), known=st.booleans())
    def append(self, steps, source, known):
        given = []
        for length in steps:
            self.seed += 1
            given.append(self.make(self.seed, length, source=source,
                                   behaviour=Behaviour.LOGGED if known else Behaviour.UNKNOWN))
        self.store.append(given)
        name = self.store._writers[source].name
        for trajectory in given:
            self.kept.append(Kept(name, self.counts[name], trajectory))
            self.counts[name] += 1
        self.forget_evicted()

    @precondition(lambda self: not any(kept.trajectory.source is Source.REAL for kept in self.kept))
    @rule()
    def append_real(self):
        self.append([4, 4], Source.REAL, True)

    @rule()
    def seal(self):
        self.store.seal()

    @rule(recover=st.booleans())
    def crash(self, recover):
        for writer in self.store._writers.values():
            for descriptor in (writer._journal, *writer._files.values()):
                os.close(descriptor)
        self.store._writers.clear()
        self.store = ReplayStore.open(self.path, CONFIG)
        if recover:
            self.store.recover()
            assert os.listdir(self.path / "open") == ["zarr.json"]

    @rule()
    def recover_beside_the_writer(self):
        self.reader.recover()
        self.seen = self.visible()

    @rule(size=st.integers(200_000, 380_000))
    def evict(self, size):
        with contextlib.suppress(UserError), self.store._locked():  # floors may leave too little
            make_room(self.path, 2**20 + size, CONFIG, self.store._gone)
        self.store.refresh()
        self.forget_evicted()

    @rule(target=positions)
    def checkpoint(self):
        return self.store.position

    @rule(position=consumes(positions))
    def rollback(self, position):
        now = self.store.position
        there = {kept.segment for kept in self.kept}
        impossible = any(now.get(name, 0) < count for name, count in position.items() if name in there)
        if impossible:
            with pytest.raises(UserError, match="the checkpoint was written with"):
                self.store.rollback(position)
            return
        self.store.rollback(position)
        for kept in self.kept:
            kept.hidden |= kept.row >= position.get(kept.segment, 0)

    @rule(data=st.data())
    def label(self, data):
        sealed = [segment for segment in self.store.segments if segment.sealed]
        if not sealed:
            return
        segment = data.draw(st.sampled_from(sealed))
        rng = np.random.default_rng(segment.rows)
        values = {"action_token": rng.integers(0, 11, (segment.rows, 3)).astype("i2"),
                  "log_prob": -rng.random((segment.rows, 3)).astype("f4"), "decision": rng.random(segment.rows) < 0.5}
        self.store.label_behaviour(segment.name, model="clone", **values)
        start = 0
        for kept in (kept for kept in self.kept if kept.segment == segment.name):
            steps = slice(start, start + len(kept.trajectory))
            start += len(kept.trajectory) + 1
            if kept.trajectory.behaviour is not Behaviour.LOGGED:
                kept.trajectory = dataclasses.replace(
                    kept.trajectory, behaviour=Behaviour.CLONED, **{name: v[steps] for name, v in values.items()})

    @rule()
    def refresh(self):
        self.reader.refresh()
        self.seen = self.visible()

    @invariant()
    def everyone_sees_what_they_should(self):
        if not hasattr(self, "store"):
            return
        self.store.refresh()
        for reader, expected in ((self.store, self.visible()), (self.reader, self.seen)):
            assert len(reader) == len(expected)
            for index, (segment, row, trajectory) in enumerate(expected):
                place, found = reader.locate(index)
                assert (place.name, found) == (segment, row)
                self.assert_same(reader.trajectory(index), trajectory)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        self.store.close()
        self.store.recover()
        for name in {kept.segment for kept in self.kept}:
            rows = [kept for kept in self.kept if kept.segment == name]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                group = zarr.open_group(self.path / "seg" / name, mode="r")
                assert group["episode"].shape[0] == len(rows)
                for camera in self.spec.cameras:
                    whole = np.concatenate([kept.trajectory.frames[camera] for kept in rows])
                    np.testing.assert_array_equal(group[f"rgb_{camera}"][:], whole)


@pytest.fixture
def life(tmp_path, spec, statistics, make_trajectory, assert_same):
    class Machine(Life):
        pass

    Machine.folder, Machine.spec, Machine.statistics = tmp_path, spec, statistics
    Machine.make, Machine.assert_same = staticmethod(make_trajectory), staticmethod(assert_same)
    return Machine


def test_any_life_of_a_store(life):
    run_state_machine_as_test(life, settings=settings(max_examples=100, stateful_step_count=40))


def test_tensorstore_and_xarray_read_a_sealed_segment(tmp_path, make_store, make_trajectory, spec):
    tensorstore, xarray = pytest.importorskip("tensorstore"), pytest.importorskip("xarray")
    store = make_store(tmp_path / "s", [make_trajectory(i, 4 + i) for i in range(5)])
    store.close()
    folder = tmp_path / "s/seg/00000000"
    dataset = xarray.open_zarr(folder, consolidated=False, chunks=None)
    for name in field_table(spec):
        column = store.segments[0].columns[name]
        array = tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder / name}/"}).result()
        for read in (array.read().result(), np.asarray(dataset[name])):
            assert read.dtype == column.dtype
            assert read.tobytes() == column.tobytes()
        np.testing.assert_array_equal(array[7:20].read().result(), column[7:20])
    assert dataset["rgb_front"].dims == ("time", "height", "width", "channel")


def test_a_record_that_was_not_synced_keeps_its_rows(tmp_path, spec, statistics, make_trajectory, assert_same,
                                                     monkeypatch):
    given = [make_trajectory(i) for i in range(3)]
    store = ReplayStore.create(tmp_path / "s", spec=spec, statistics=statistics, embodiment="arm",
                               config=StoreConfig(durability="sync"))
    store.append(given[:1])
    log = store._writers[Source.SIM]._journal

    def failing(descriptor):
        if descriptor == log:
            raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(OSError, match="failed"):
        store.append(given[1:2])
    monkeypatch.undo()
    store.append(given[2:])
    for reader in (store, ReplayStore.open(tmp_path / "s")):
        assert len(reader) == 3
        for index, trajectory in enumerate(given):
            assert_same(reader.trajectory(index), trajectory)


def test_a_seal_that_failed_is_made_good(tmp_path, make_store, make_trajectory, assert_same, monkeypatch):
    store = make_store(tmp_path / "s", [make_trajectory(0)])

    def failing(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("data.segment.write_group", failing)
    with pytest.raises(UserError, match="no space left"):
        store.seal()
    monkeypatch.undo()
    store.append([make_trajectory(1)])
    assert sorted(path.name for path in (tmp_path / "s/seg").iterdir() if path.is_dir()) == ["00000000"]
    for index in range(2):
        assert_same(store.trajectory(index), make_trajectory(index))
