import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import repair as repairing
from data.cold import compact
from data.layout import EPISODE, field_table, row_bytes
from data.store import ReplayStore
from data.types import Behaviour, Source, UserError
from data.verify import verify

SETTINGS = {"quality": 90, "keep_newest": 0}
STEPS = (5, 20, 14)


def fill(path, make_store, make_trajectory, codec):
    store = make_store(path, [make_trajectory(i, steps, behaviour=Behaviour.UNKNOWN if i else Behaviour.LOGGED)
                              for i, steps in enumerate(STEPS)])
    store.close()
    store.append([make_trajectory(7, 3, source=Source.REAL)])
    store.close()
    if codec:
        compact(path, codec=codec, **SETTINGS)
    return ReplayStore.open(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory, make_store, make_trajectory):
    """One store per tier, and what it holds."""
    made = {}
    for codec in (None, "zstd", "jpeg"):
        path = tmp_path_factory.mktemp("stores") / "s"
        store = fill(path, make_store, make_trajectory, codec)
        made[codec] = path, [store.trajectory(i) for i in range(len(store))]
    return made


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def label(store, segment):
    rows = next(s for s in store.segments if s.name == segment).rows
    store.label_behaviour(segment, action_token=np.full((rows, 3), 2, "i2"), model="clone",
                          log_prob=np.repeat(-np.arange(rows, dtype="f4")[:, None], 3, 1),
                          decision=np.arange(rows) % 2 == 0)


@pytest.mark.parametrize("codec", [None, "zstd", "jpeg"])
def test_whole_stores_are_fine(stores, codec):
    report = verify(stores[codec][0], repair=False)
    assert report.lines() == ["2 segments, 4 episodes: all as they were committed"]
    assert not report.damaged
    assert [segment.state for segment in report.segments] == ["cold" if codec else "hot"] * 2


@pytest.mark.parametrize("codec", [None, "zstd", "jpeg"])
@given(data=st.data())
def test_any_flipped_bit_is_found_and_repair_keeps_the_rest(stores, codec, data, tmp_path_factory, spec, assert_same):
    path, held = stores[codec]
    copy = tmp_path_factory.mktemp("flipped") / "s"
    shutil.copytree(path, copy)
    folder = copy / "seg/00000000"
    file = data.draw(st.sampled_from(sorted(p for p in folder.rglob("*") if p.is_file())))
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    flip(file, bit)

    report = verify(copy, repair=False)
    (damaged,) = report.damaged
    assert report.remaining == ["seg/00000000"]
    lost = {episode for problem in damaged.problems for episode in problem.episodes}
    column, fields = file.parent.name, field_table(spec)
    tables = [problem for problem in damaged.problems if problem.where == "tables"]
    assert bool(tables) == (file == folder / "zarr.json" or
                            (column in ("episode", "provenance") and file.name != "zarr.json"))
    if not tables:
        assert any(column in line.split(": ")[1] for line in damaged.lines())
        assert lost <= ({0, 1, 2} if codec == "zstd" and column.startswith("rgb") else {min(lost, default=0)})
    if column in fields and file.name != "zarr.json" and (not column.startswith("rgb") or codec is None):
        row = bit // 8 // row_bytes(fields[column])
        ends = np.cumsum([steps + 1 for steps in STEPS])
        assert lost == ({int(np.searchsorted(ends, row, side="right"))} if row < ends[-1] else set())

    report = verify(copy, repair=True)
    assert report.remaining == []
    assert len(report.repaired) == 1
    assert not verify(copy, repair=False).damaged
    assert (copy / "control/quarantine/00000000").is_dir()
    store = ReplayStore.open(copy)
    intact = [3] if tables else [i for i in range(4) if i not in lost]
    assert len(store) == len(intact)
    for index, episode in enumerate(intact):
        assert_same(store.trajectory(index), held[episode])
    assert verify(copy, repair=True).repaired == []


def test_what_was_cut_off_or_is_gone_is_found(stores, tmp_path, assert_same):
    path, held = stores[None]
    shutil.copytree(path, tmp_path / "s")
    file = tmp_path / "s/seg/00000000/rgb_front/c.0.0.0.0"
    os.truncate(file, (6 + 3) * 8 * 8 * 3)
    (tmp_path / "s/seg/00000001/zarr.json").unlink()
    with pytest.raises(UserError, match="damaged segment"):
        ReplayStore.open(tmp_path / "s")
    report = verify(tmp_path / "s", repair=True)
    assert report.lines()[:3] == [
        "seg/00000000: rgb_front: should have 9268 bytes, has 1728 (costs no episode)",
        "seg/00000000: rgb_front: differs from its checksum (episodes 1-2 of 3)",
        "seg/00000001: tables: zarr.json is missing (nothing in it can be read)"]
    store = ReplayStore.open(tmp_path / "s")
    assert len(store) == 1
    assert_same(store.trajectory(0), held[0])


def test_a_repair_keeps_labels_rollbacks_and_checkpoints(tmp_path, make_store, make_trajectory, assert_same):
    store = fill(tmp_path / "s", make_store, make_trajectory, None)
    label(store, "00000000")
    held = [store.trajectory(i) for i in range(4)]
    earlier = {"00000000": 2}
    flip(tmp_path / "s/seg/00000000/proprio/c.0.0", 3)
    verify(tmp_path / "s", repair=True)
    store.refresh()
    assert store.position == {"00000001": 1, "00000002": 2}
    for index, episode in enumerate((1, 2, 3)):  # in the order of their commits
        assert_same(store.trajectory(index), held[episode])
    assert not (tmp_path / "s/cloned/00000000").exists()
    assert store.rollback(earlier) == ["00000001", "00000002"]
    assert_same(store.trajectory(0), held[1])
    assert len(store) == 1

    flip(tmp_path / "s/seg/00000002/action/zarr.json", 3)  # costs no episode; the hidden one stays hidden
    verify(tmp_path / "s", repair=True)
    store = ReplayStore.open(tmp_path / "s")
    assert store.position == {"00000003": 1}
    assert_same(store.trajectory(0), held[1])
    assert store.rollback(earlier) == []
    store.append([make_trajectory(9)])
    assert store.position == {"00000003": 1, "00000004": 1}


def test_a_damaged_label_is_taken_off(tmp_path, make_store, make_trajectory):
    store = fill(tmp_path / "s", make_store, make_trajectory, None)
    label(store, "00000000")
    (tmp_path / "s/cloned/00000000/log_prob/c.0.0").unlink()
    report = verify(tmp_path / "s", repair=True)
    assert "cloned/00000000: log_prob: " in report.lines()[0]
    assert "label them with python main.py pretrain" in report.lines()[-1]
    assert ReplayStore.open(tmp_path / "s").episodes.behaviour.tolist() == ["logged", "unknown", "unknown", "logged"]


def test_an_open_segment_is_only_looked_at_while_its_writer_lives(tmp_path, make_store, make_trajectory, assert_same):
    given = [make_trajectory(i, 4) for i in range(4)]
    store = make_store(tmp_path / "s", *[[trajectory] for trajectory in given])
    (whole,) = verify(tmp_path / "s", repair=False).segments
    assert (whole.state, whole.problems) == ("open", [])
    folder = tmp_path / "s/open/00000000"
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    flip(folder / "journal", 8 * (len(lines[0]) + 30))  # in the second record
    flip(folder / "reward/c.0", 8 * 4 * (2 * 5 + 1))  # in the third episode
    with (folder / "journal").open("ab") as file:
        file.write(b"0123")
    report = verify(tmp_path / "s", repair=True)
    assert report.lines()[:4] == [
        "open/00000000: journal: 1 records are damaged, the first is number 1; 2 intact ones follow it "
        "(costs no episode)",
        "open/00000000: reward: differs from its checksum (episodes 1 of 3)",
        "open/00000000: journal: 4 bytes at its end are of an append that is under way or was cut short (no damage)",
        "1 segments, 3 episodes: 1 damaged"]
    assert report.remaining == ["open/00000000"]
    assert len(store) == 4  # its writer is alive until here


def leave_open(path, make_trajectory, given):
    store = ReplayStore.open(path)
    for seed in given:
        store.append([make_trajectory(seed, 4)])
    os.kill(os.getpid(), signal.SIGKILL)


def run(target, *arguments):
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def test_what_a_dead_writer_left_is_sealed_or_salvaged(tmp_path, make_store, make_trajectory, assert_same):
    make_store(tmp_path / "s")
    run(leave_open, tmp_path / "s", make_trajectory, range(4))
    folder = tmp_path / "s/open/00000000"
    lines = (folder / "journal").read_bytes().splitlines(keepends=True)
    flip(folder / "journal", 8 * (len(lines[0]) + 30))
    assert verify(tmp_path / "s", repair=True).remaining == []
    store = ReplayStore.open(tmp_path / "s")
    assert [store.provenance(i)["seed"] for i in range(len(store))] == [0, 2, 3]
    assert_same(store.trajectory(1), make_trajectory(2, 4))
    run(leave_open, tmp_path / "s", make_trajectory, range(4, 6))
    assert not verify(tmp_path / "s", repair=True).damaged
    assert not list((tmp_path / "s/open").glob("0*"))
    assert len(ReplayStore.open(tmp_path / "s")) == 5


def killed_repair(path, number):
    calls = iter(range(10**6))

    def dying(real):
        def call(*arguments, **options):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for name in ("rename", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    repairing.write_json = dying(repairing.write_json)
    verify(path, repair=True)


def test_a_killed_repair_is_finished_by_the_next(tmp_path, make_store, make_trajectory, assert_same):
    store = fill(tmp_path / "s", make_store, make_trajectory, None)
    label(store, "00000000")
    held = [store.trajectory(i) for i in range(4)]
    store.rollback({"00000000": 2, "00000001": 1})
    flip(tmp_path / "s/seg/00000000/proprio/c.0.0", 3)
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        path = tmp_path / f"s{number}"
        shutil.copytree(tmp_path / "s", path)
        code = run(killed_repair, path, number)
        verify(path, repair=True)
        store = ReplayStore.open(path)
        assert store.position == {"00000001": 1, "00000002": 1}, number
        for index, episode in enumerate((1, 3)):
            assert_same(store.trajectory(index), held[episode])
        assert store.segments[-1].table[:, EPISODE.index("length")].tolist() == [20, 14]
        number += 1
    assert number > 40
    assert code == 0


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="no replay store at"):
        verify(tmp_path / "nowhere", repair=True)
