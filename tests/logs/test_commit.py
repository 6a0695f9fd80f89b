"""Whole folders of logs into a store: robomimic files made here, through the command's functions."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.logs.commit import ingest_logs
from data.logs.inspect import inspect, propose, write_mapping
from data.logs.mapping import Camera, LogMapping, Part, read_mapping
from data.store import ReplayStore
from data.types import Behaviour, Source, Success, UserError

MAPPING = LogMapping(
    proprio=(Part(stream="obs/joints", names=("q0", "q1")),), action=(Part(stream="actions", names=("dq0", "dq1")),),
    cameras={"front": Camera(stream="obs/front_image")}, clock="index", rate=1.0, max_gap=0.5, embodiment="arm",
    instruction="stack the cubes")


def write_demos(path, seeds, steps=9, nan=None):
    with h5py.File(path, "w") as file:
        for i, seed in enumerate(seeds):
            draw = np.random.default_rng(seed)
            demo = file.create_group(f"data/demo_{i}")
            joints = draw.normal(size=(steps, 2))
            if nan is not None:
                joints[nan] = np.nan
            demo["obs/joints"] = joints
            demo["obs/front_image"] = draw.integers(0, 255, (steps, 24, 32, 3), dtype=np.uint8)
            demo["actions"] = draw.uniform(-2, 2, (steps, 2))


@pytest.fixture
def logs(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for i in range(4):
        write_demos(folder / f"day_{i}.hdf5", [10 * i, 10 * i + 1])
    return folder


def contents(store):
    replay = ReplayStore.open(store)
    return [(t.provenance["log"], t.provenance["episode"], t.proprio.tobytes(), t.action.tobytes(),
             t.frames["front"].tobytes()) for t in map(replay.trajectory, range(len(replay)))]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_is_committed_is_what_was_recorded_whatever_the_processes(logs, tmp_path, workers):
    report = ingest_logs(logs, tmp_path / "store", MAPPING, image_size=24, workers=workers, action_range="range")
    assert (len(report.files), report.added, report.steps, report.refused) == (4, 8, 64, {})
    store = ReplayStore.open(tmp_path / "store")
    assert store.spec.proprio_names == ("q0", "q1")
    assert store.embodiment == "arm"
    for index in range(8):
        t = store.trajectory(index)
        draw = np.random.default_rng(10 * (index // 2) + index % 2)
        joints, pictures = draw.normal(size=(9, 2)), draw.integers(0, 255, (9, 24, 32, 3), dtype=np.uint8)
        action = draw.uniform(-2, 2, (9, 2))
        np.testing.assert_array_equal(t.proprio, joints.astype("f4"))
        np.testing.assert_allclose(store.statistics.denormalise(t.action), action[:-1], atol=1e-6)
        assert t.frames["front"].shape == (9, 24, 24, 3)
        assert abs(float(t.frames["front"].mean()) - pictures.mean()) < 2
        assert (t.source, t.behaviour, t.success) == (Source.REAL, Behaviour.UNKNOWN, Success.UNKNOWN)
        assert t.truncated.tolist() == [False] * 7 + [True]
        assert t.instruction == "stack the cubes"
        assert t.provenance["log"] == f"day_{index // 2}.hdf5"
        assert str(tmp_path) not in str(t.provenance)


def test_again_adds_nothing_and_another_mapping_adds_its_own(logs, tmp_path):
    ingest_logs(logs, tmp_path / "store", MAPPING, image_size=16)
    before = contents(tmp_path / "store")
    report = ingest_logs(logs, tmp_path / "store", MAPPING, image_size=16)
    assert (report.added, report.already) == (0, 8)
    assert contents(tmp_path / "store") == before
    with pytest.raises(UserError, match=r"rate does not match: the store .* has 1\.0, the logs 2\.0"):
        ingest_logs(logs, tmp_path / "store", LogMapping(**{**vars(MAPPING), "rate": 2.0}), image_size=16)


def test_a_dry_run_says_the_same_and_commits_nothing(logs, tmp_path):
    report = ingest_logs(logs, tmp_path / "store", MAPPING, image_size=16, dry_run=True)
    assert (report.added, report.steps) == (8, 64)
    assert "would add 8 episodes" in report.lines()[0]
    assert not (tmp_path / "store").exists()


def test_damage_is_named_and_the_rest_is_kept(logs, tmp_path):
    whole = (logs / "day_1.hdf5").read_bytes()
    (logs / "day_1.hdf5").write_bytes(whole[: len(whole) // 2])
    write_demos(logs / "day_2.hdf5", [20], nan=4)
    with h5py.File(logs / "day_3.hdf5", "a") as file:
        del file["data/demo_1/actions"]
    report = ingest_logs(logs, tmp_path / "store", MAPPING, image_size=16)
    assert [name.split()[0] for name in report.refused] == ["day_1.hdf5", "day_3.hdf5"]
    assert "no vector stream 'actions'" in report.refused["day_3.hdf5 demo_1"]
    assert report.added == 2 + 2 + 1  # the second file is cut where a value is not finite
    assert report.of("day_2.hdf5").masked == {"obs/joints: values that are not finite": 1}
    assert "  day_2.hdf5: 1 rows: obs/joints: values that are not finite" in report.lines()
    assert all("Traceback" not in line for line in report.lines())


def test_idle_steps_are_marked_and_kept(tmp_path):
    (tmp_path / "logs").mkdir()
    write_demos(tmp_path / "logs" / "day.hdf5", [0], steps=30)
    with h5py.File(tmp_path / "logs" / "day.hdf5", "a") as file:
        for name in ("obs/joints", "actions"):
            file["data/demo_0"][name][10:18] = file["data/demo_0"][name][10]
    at_five = LogMapping(**{**vars(MAPPING), "rate": 5.0, "max_gap": 1.0})  # each message five times
    report = ingest_logs(tmp_path / "logs", tmp_path / "store", at_five, image_size=16)
    trajectory = ReplayStore.open(tmp_path / "store").trajectory(0)
    assert len(trajectory) == report.steps == 145
    ((first, last),) = trajectory.provenance["idle_steps"]
    assert (first, last) == (50, 89)  # rows 50 to 89 show messages 10 to 17; those between others change within 1 s
    assert report.idle == report.to_dict()["files"]["day.hdf5"]["idle"] == 39
    assert "  39 steps are idle: marked, and kept" in report.lines()


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no log of a known format"):
        ingest_logs(tmp_path / "empty", tmp_path / "store", MAPPING, image_size=16)
    write_demos(tmp_path / "empty" / "short.hdf5", [0], steps=1)
    with pytest.raises(UserError, match=r"no two rows in a row are usable"):
        ingest_logs(tmp_path / "empty", tmp_path / "store", MAPPING, image_size=16)
    assert not (tmp_path / "store").exists()


def _ingest(folder, store):
    ingest_logs(Path(folder), Path(store), MAPPING, image_size=24, workers=2)


@pytest.mark.slow
def test_killed_half_way_and_run_again_ends_in_the_same_store(logs, tmp_path):
    _ingest(logs, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    context, cuts = multiprocessing.get_context("spawn"), 0
    for wanted in (1, 3, 6):
        process = context.Process(target=_ingest, args=(logs, tmp_path / f"cut_{wanted}"))
        process.start()
        store = tmp_path / f"cut_{wanted}"
        for _ in range(3000):
            if not process.is_alive() or ((store / "zarr.json").exists() and len(ReplayStore.open(store)) >= wanted):
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cuts += len(ReplayStore.open(store)) < 8
        _ingest(logs, store)
        assert contents(store) == expected
    assert cuts  # at least one was cut


def test_inspection_proposes_a_mapping_that_works(logs, tmp_path):
    found = inspect(logs)
    assert [title.split()[0] for title, _ in found.episodes] == [f"day_{i}.hdf5" for i in range(4)]
    write_mapping(tmp_path / "mapping.yaml", propose(found.episodes[0][1]))
    with pytest.raises(UserError, match=r"is there already, perhaps corrected by hand"):
        write_mapping(tmp_path / "mapping.yaml", propose(found.episodes[0][1]))
    mapping = read_mapping(tmp_path / "mapping.yaml")
    assert [part.stream for part in mapping.action] == ["actions"]
    assert [part.stream for part in mapping.proprio] == ["obs/joints"]
    assert {name: camera.stream for name, camera in mapping.cameras.items()} == {"front_image": "obs/front_image"}
    assert ingest_logs(logs, tmp_path / "store", mapping, image_size=16).added == 8
