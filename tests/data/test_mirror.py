"""A copy follows its store through everything that happens to it, and shows whole episodes at any moment."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.budget import StoreConfig
from data.cold import compact
from data.mirror import Holding, Mirror, changes
from data.store import ReplayStore
from data.types import Behaviour, Source, UserError

SMALL = StoreConfig(segment_bytes=40_000)


def follow(store, mirror, most=2**20):
    """Until nothing is lacking."""
    while True:
        news = changes(store, mirror.held, most=most)
        mirror.take(news)
        if news.whole:
            return


def names(store):
    """What every reader calls its episodes, and what they hold beside their rows."""
    episodes = store.episodes
    return list(zip(episodes.segment.tolist(), episodes.row.tolist(), episodes.code("commit_time").tolist(),
                    episodes.behaviour.tolist(), episodes.success.tolist(), strict=True))


def check_same(copy, store, assert_same):
    assert names(copy) == names(store)
    for i in range(len(store)):
        assert_same(copy.trajectory(i), store.trajectory(i))


def label(store, seed):
    """Estimate the behaviour of the first sealed segment that lacks one, if there is one."""
    for segment in store.segments:
        unknown = segment.unknown_rows()
        if segment.sealed and unknown.any():
            rng = np.random.default_rng(seed)
            store.label_behaviour(
                segment.name, action_token=rng.integers(0, 11, (segment.rows, 3)).astype("i2"),
                log_prob=-rng.random((segment.rows, 3)).astype("f4"), decision=unknown, model=f"clone {seed}")
            return


STEPS = st.lists(st.one_of(
    st.tuples(st.just("append"), st.sampled_from(list(Source)), st.integers(1, 3)),
    st.tuples(st.sampled_from(["seal", "rollback", "label", "compact", "look", "follow"]))), min_size=1, max_size=14)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, most=st.sampled_from([3_000, 50_000, 2**20]))
def test_a_copy_ends_as_its_store_and_shows_nothing_else_on_the_way(
    steps, most, tmp_path_factory, spec, statistics, make_trajectory, assert_same
):
    folder = tmp_path_factory.mktemp("mirror")
    store = ReplayStore.create(folder / "store", spec=spec, statistics=statistics, embodiment="arm", config=SMALL)
    mirror, copy, seed, positions = Mirror(folder / "copy"), None, 0, [store.position]
    for what, *how in steps:
        if what == "append":
            source, count = how
            unknown = source is Source.REAL
            behaviour = Behaviour.UNKNOWN if unknown else Behaviour.LOGGED
            store.append([make_trajectory(seed + i, 3 + (seed + i) % 5, source=source, behaviour=behaviour)
                          for i in range(count)])
            seed += count
            positions.append(store.position)
        elif what == "seal":
            store.seal()
        elif what == "rollback":
            store.rollback(positions[seed % len(positions)])
        elif what == "label":
            label(store, seed)
        elif what == "compact":
            store.close()
            compact(store.path, codec="zstd", quality=90, keep_newest=0)
            store.refresh()
        elif what == "look":  # one call, maybe a part of what is lacking
            mirror.take(changes(store.path, mirror.held, most=most))
        else:
            follow(store.path, mirror, most)
        if copy is None and (mirror.path / "zarr.json").exists():
            copy = ReplayStore.open(mirror.path)
        if copy is not None:
            copy.refresh()
            for i in range(len(copy)):
                segment, row = copy.locate(i)
                assert copy.trajectory(i).provenance["seed"] in range(seed)
                assert segment.path.exists()
                assert row < len(segment)
    follow(store.path, mirror, most)
    copy = copy or ReplayStore.open(mirror.path)
    copy.refresh()
    check_same(copy, store, assert_same)
    check_same(ReplayStore.open(mirror.path), store, assert_same)
    store.close()
    follow(store.path, mirror, most)
    copy.refresh()
    check_same(copy, store, assert_same)
    assert all(segment.sealed for segment in copy.segments)


def test_what_a_budget_evicts_goes_from_the_copy_too(tmp_path, spec, statistics, make_trajectory, assert_same):
    config = StoreConfig(segment_bytes=2**16, budget_bytes=2**21)
    store = ReplayStore.create(tmp_path / "store", spec=spec, statistics=statistics, embodiment="arm", config=config)
    mirror = Mirror(tmp_path / "copy")
    for seed in range(120):
        store.append([make_trajectory(seed, 60)])
        if seed % 7 == 0:
            follow(store.path, mirror)
    assert store.evicted(), "the test has to evict something"
    store.refresh()
    follow(store.path, mirror)
    check_same(ReplayStore.open(mirror.path), store, assert_same)
    assert {path.name for path in (mirror.path / "seg").iterdir()} == {
        path.name for path in (store.path / "seg").iterdir() if path.is_dir()}


def test_what_a_reader_has_mapped_stays_while_it_is_sealed_and_evicted(tmp_path, make_store, make_trajectory,
                                                                       assert_same):
    first = make_trajectory(1)
    store, mirror = make_store(tmp_path / "store", [first]), Mirror(tmp_path / "copy")
    follow(store.path, mirror)
    copy = ReplayStore.open(mirror.path)
    assert not copy.segments[0].sealed
    store.append([make_trajectory(2)])
    store.close()
    follow(store.path, mirror)
    assert_same(copy.trajectory(0), first)  # mapped while it was open
    copy.refresh()
    assert len(copy) == 2
    assert copy.segments[0].sealed


WRITER = """
import sys, os
from data.store import ReplayStore
import numpy as np
store = ReplayStore.open(sys.argv[1])
source = ReplayStore.open(sys.argv[2])
for i in range(len(source)):
    store.append([source.trajectory(i)])
    print(i, flush=True)
sys.stdin.read()
"""


def test_a_writer_that_was_killed_leaves_the_copy_what_it_acknowledged(tmp_path, make_store, make_trajectory,
                                                                       assert_same):
    given = make_store(tmp_path / "given", [make_trajectory(seed) for seed in range(5)])
    store, mirror = make_store(tmp_path / "store"), Mirror(tmp_path / "copy")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(store.path), str(given.path)], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for i in range(5):
        assert writer.stdout.readline().strip() == str(i)
        if i % 2:
            follow(store.path, mirror)
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    (segment,) = [entry for entry in (store.path / "open").iterdir() if entry.is_dir()]
    with (segment / "journal").open("ab") as file:
        file.write(b"0badc0de [{\"start\": 99")  # a torn line
    follow(store.path, mirror)
    copy = ReplayStore.open(mirror.path)
    assert len(copy) == 5
    store.append([make_trajectory(9)])  # seals what was left
    follow(store.path, mirror)
    copy.refresh()
    assert len(copy) == 6
    check_same(copy, store, assert_same)


def test_what_is_told_is_bounded_and_no_store_is_one_line(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "store", [make_trajectory(seed, 40) for seed in range(20)])
    store.close()
    held, sizes = Mirror(tmp_path / "copy"), []
    while True:
        news = changes(store.path, held.held, most=20_000)
        sizes.append(sum(len(piece.content) for segment in news.segments for piece in segment.pieces))
        held.take(news)
        if news.whole:
            break
    assert max(sizes) <= 20_000
    assert len(sizes) > 10
    with pytest.raises(UserError, match="no replay store at"):
        changes(tmp_path / "nothing", Holding())
