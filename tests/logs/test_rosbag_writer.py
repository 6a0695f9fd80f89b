"""The robot stand-in's recordings as ROS 2 bags, there and back."""

import dataclasses

import numpy as np
import pytest

from data.logs.commit import ingest_logs
from data.logs.inspect import contact_sheet, inspect, propose
from data.logs.mapping import Camera, LogMapping, Part
from data.logs.rosbag_writer import write_rosbags
from data.store import ReplayStore
from data.types import Source, Success, UserError
from tests import examples

SPEC = dataclasses.replace(examples.SPEC, control_hz=12.5)
MAPPING = LogMapping(
    proprio=(Part(stream="/joint_states.position"),), action=(Part(stream="/command.position"),),
    cameras={"front": Camera(stream="/front/compressed")}, clock="header", rate=12.5, success="/success.position",
    embodiment="toy", instruction="reach the goal")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    made = []
    for seed in range(3):
        t = examples.trajectory(seed, 7, Source.SIM)
        step = np.arange(7)
        if seed == 0:  # goes on after its success
            t = dataclasses.replace(t, terminated=step == 4, reward=(step >= 4).astype(np.float32), truncated=step < 0)
        made.append(dataclasses.replace(t, timestamp=np.arange(8) / 12.5))
    folder = tmp_path_factory.mktemp("bags") / "bags"
    write_rosbags(folder, made, spec=SPEC, statistics=examples.STATISTICS)
    return folder, made


def test_what_was_recorded_comes_back(recorded, tmp_path):
    folder, made = recorded
    report = ingest_logs(folder, tmp_path / "store", MAPPING, image_size=16, action_range="range")
    assert (report.added, report.refused, report.masked) == (3, {}, 0)
    store = ReplayStore.open(tmp_path / "store")
    for index, t in enumerate(made):
        read = store.trajectory(index)
        np.testing.assert_array_equal(read.frames["front"], t.frames["front"])  # PNG, and no scaling at this size
        np.testing.assert_allclose(read.proprio, t.proprio, atol=1e-6)
        np.testing.assert_allclose(store.statistics.denormalise(read.action),
                                   examples.STATISTICS.denormalise(t.action), atol=1e-5)
        assert read.terminated.tolist() == t.terminated.tolist()
        assert read.truncated.tolist() == t.truncated.tolist()
        assert read.reward.tolist() == t.reward.tolist()
        assert read.success is t.success
        np.testing.assert_allclose(read.timestamp, t.timestamp, atol=1e-6)


def test_a_success_within_the_last_step_is_kept(tmp_path):
    """A simulator that stops at the success makes a short last step: no control step of the grid comes after it."""
    t = examples.trajectory(2, 7, Source.SIM)
    time = np.append(np.arange(7) / 12.5, 6.3 / 12.5)
    write_rosbags(tmp_path / "bags", [dataclasses.replace(t, timestamp=time)], spec=SPEC,
                  statistics=examples.STATISTICS)
    ingest_logs(tmp_path / "bags", tmp_path / "store", MAPPING, image_size=16)
    read = ReplayStore.open(tmp_path / "store").trajectory(0)
    assert read.success is Success.YES
    assert read.terminated.tolist() == [False] * 5 + [True]


def test_by_arrival_the_rows_are_the_same_one_delay_later(recorded, tmp_path):
    folder, made = recorded
    ingest_logs(folder, tmp_path / "store", dataclasses.replace(MAPPING, clock="log", success=None), image_size=16)
    read = ReplayStore.open(tmp_path / "store").trajectory(1)
    np.testing.assert_array_equal(read.frames["front"], made[1].frames["front"])
    assert read.success is Success.UNKNOWN


def test_inspection_finds_what_was_commanded(recorded):
    folder, _ = recorded
    found = inspect(folder)
    assert len(found.episodes) == 3
    mapping = propose(found.episodes[0][1])
    assert [part.stream for part in mapping.action] == ["/command.position"]
    assert [part.stream for part in mapping.proprio] == ["/joint_states.position"]
    assert {name: camera.stream for name, camera in mapping.cameras.items()} == {"front": "/front/compressed"}
    assert (mapping.clock, mapping.rate) == ("header", 12.5)
    assert contact_sheet(found.episodes[0][1]).size == (960, 134)


def test_a_folder_with_something_in_it_is_left_alone(recorded):
    folder, made = recorded
    with pytest.raises(UserError, match="is not empty"):
        write_rosbags(folder, made, spec=SPEC, statistics=examples.STATISTICS)
