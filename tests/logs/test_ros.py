"""Bags: their files, metadata and clocks, and the sample bags."""

import shutil
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags import rosbag1, rosbag2

from data.logs import ros
from data.logs.streams import Refused
from data.types import UserError
from tests.logs.bags import (
    MCAP,
    ROS1,
    ROS2,
    SECOND,
    SHARED,
    SQLITE,
    START,
    STORAGES,
    TWIST,
    change_metadata,
    joint_messages,
    joints,
    needs_shared,
    read,
    split_bag,
    write_bag,
    write_bag1,
    write_mcap,
)


@pytest.mark.parametrize(("plugin", "mode"), STORAGES, ids=lambda value: value.name)
def test_a_bag_gives_what_was_written(tmp_path, plugin, mode):
    path = write_bag(tmp_path / "bag", joint_messages(), plugin, mode)
    assert ros.sniff(path) == ros.open_log(path).format == f"rosbag2 ({'mcap' if plugin is MCAP else 'sqlite3'})"
    episode = read(path)
    assert (episode.name, episode.whole, episode.problems) == ("bag", True, ())
    (stream,) = episode.streams.values()
    assert (stream.name, stream.names, stream.schema) == ("/joints.position", ("a", "b"), "sensor_msgs/msg/JointState")
    np.testing.assert_array_equal(stream.values, [[i, -i] for i in range(6)])
    np.testing.assert_allclose(stream.clocks["log"], np.arange(6) / 10, atol=1e-9)
    np.testing.assert_allclose(stream.clocks["header"], np.arange(6) / 10 - 0.02, atol=1e-9)
    assert set(stream.clocks) == {"header", "log"}
    assert episode.facts["start_ns"] == START
    assert episode.facts["topics"] == {"/joints": {"type": "sensor_msgs/msg/JointState", "messages": 6}}
    (file,) = (file for file in path.iterdir() if file.name != "metadata.yaml")
    assert ros.sniff(file) == ros.sniff(path)
    alone = read(file)
    assert (alone.name, alone.whole, alone.problems) == (file.name, True, ())
    np.testing.assert_array_equal(alone.streams["/joints.position"].values, stream.values)


@pytest.mark.parametrize("compression", [None, *rosbag1.Writer.CompressionFormat])
def test_a_ros1_bag_gives_what_was_written(tmp_path, compression):
    path = write_bag1(tmp_path / "run.bag", joint_messages(store=ROS1), compression)
    assert ros.sniff(path) == "ROS 1 bag"
    episode = read(path)
    assert (episode.name, episode.whole, episode.problems) == ("run.bag", True, ())
    stream = episode.streams["/joints.position"]
    np.testing.assert_array_equal(stream.values, [[i, -i] for i in range(6)])
    np.testing.assert_allclose(stream.clocks["header"], np.arange(6) / 10 - 0.02, atol=1e-9)


@settings(max_examples=15)
@given(st.lists(st.lists(st.floats(width=64), min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_number_survives(tmp_path_factory, rows):
    """NaN and infinities included."""
    path = tmp_path_factory.mktemp("bag")
    messages = [("/j", "sensor_msgs/msg/JointState", START, joints(row, names="xyz")) for row in rows]
    episode = read(write_mcap(path / "a.mcap", messages))
    np.testing.assert_array_equal(episode.streams["/j.position"].values, rows)


def test_times_are_kept_as_recorded(tmp_path):
    """Bursts, steps back and clocks of different origins."""
    times = [5 * SECOND, 3 * SECOND, 3 * SECOND, 9 * SECOND]
    messages = [("/j", "sensor_msgs/msg/JointState", time, joints([0, 0], ns)) for time, ns in zip(
        times, [7, 2**31 * SECOND - 1, 8, 9], strict=True)]
    stream = read(write_mcap(tmp_path / "a.mcap", messages)).streams["/j.position"]
    assert stream.clocks["log"].tolist() == [2, 0, 0, 6]
    np.testing.assert_allclose(stream.clocks["header"], [-3, 2**31 - 3, -3, -3], atol=1e-6)


def test_a_header_without_stamps_is_no_clock(tmp_path):
    messages = [*joint_messages(3), ("/joints", "sensor_msgs/msg/JointState", START, joints([7, 7]))]
    episode = read(write_mcap(tmp_path / "a.mcap", messages))
    assert set(episode.streams["/joints.position"].clocks) == {"log"}
    assert "1 of 4 messages have no stamp" in episode.problems[0]


def test_split_files_are_one_episode(tmp_path):
    folder = split_bag(tmp_path)
    episode = read(folder)
    assert (episode.name, episode.whole, episode.problems) == ("run", True, ())
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(12))
    np.testing.assert_allclose(episode.streams["/joints.position"].clocks["log"], np.arange(12) / 10, atol=1e-9)


def test_missing_files_are_said(tmp_path):
    folder = split_bag(tmp_path)
    (folder / "run_1.mcap").unlink()
    episode = read(folder)
    assert not episode.whole
    assert "metadata.yaml: names 3 files, 1 of them missing" in episode.problems
    assert "metadata.yaml: counts 12 messages, the files hold 8" in episode.problems
    assert len(episode.streams["/joints.position"]) == 8
    for file in folder.glob("*.mcap"):
        file.unlink()
    refused = read(folder)
    assert "no messages; metadata.yaml: names 3 files, 3 of them missing" in refused.reason


def test_files_of_other_names_than_the_metadata_say_are_read(tmp_path):
    folder = split_bag(tmp_path)
    change_metadata(folder, relative_file_paths=["run_0.mcap", "lost_1.mcap", "run_2.mcap"])
    episode = read(folder)
    assert episode.whole
    assert episode.problems == ("metadata.yaml: names 3 files, 1 of them missing",)
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(12))


def test_files_that_the_metadata_do_not_name_are_not_read(tmp_path):
    folder = split_bag(tmp_path)
    shutil.copy(folder / "run_1.mcap", folder / "filtered.mcap")
    episode = read(folder)
    assert len(episode.streams["/joints.position"]) == 12
    assert episode.problems == ("metadata.yaml: does not name filtered.mcap, not read",)


def test_paths_of_old_metadata_begin_with_the_folder(tmp_path):
    folder = split_bag(tmp_path)
    change_metadata(folder, relative_file_paths=[f"run/run_{i}.mcap" for i in range(3)], version=3)
    assert read(folder).problems == ()


@pytest.mark.parametrize("path", ["../secret.mcap", "a/../../secret.mcap", "/etc/passwd", "..\\secret.mcap",
                                  "C:\\secret.mcap", "..", "\\\\host\\secret"])
def test_a_path_out_of_the_folder_is_refused(tmp_path, path):
    folder = split_bag(tmp_path)
    shutil.copy(folder / "run_0.mcap", tmp_path / "secret.mcap")
    change_metadata(folder, relative_file_paths=["run_0.mcap", path])
    refused = read(folder)
    assert isinstance(refused, Refused)
    assert "not in the folder" in refused.reason


@pytest.mark.parametrize("content", [
    None, b"", b"\0\xff", b"rosbag2_bagfile_information: 7", b"rosbag2_bagfile_information: [", b"a: !!python/name:os",
    b"rosbag2_bagfile_information: {relative_file_paths: 5, message_count: many, topics_with_message_count: [1]}"])
def test_metadata_that_say_nothing(tmp_path, content):
    folder = split_bag(tmp_path)
    (folder / "metadata.yaml").unlink()
    if content is not None:
        (folder / "metadata.yaml").write_bytes(content)
    assert ros.sniff(folder) == "rosbag2 (mcap)"
    episode = read(folder)
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(12))
    assert episode.whole
    said = "missing" if content is None else "damaged"
    assert [said in problem for problem in episode.problems] == ([] if b"message_count" in (content or b"") else [True])


def test_folders_that_are_no_single_bag_are_left_to_their_files(tmp_path):
    """Without metadata, files that are not splits of the folder's own bag are bags of their own."""
    for name in ("first.mcap", "second.mcap"):
        write_mcap(tmp_path / name, joint_messages(2))
    assert ros.sniff(tmp_path) is None
    with pytest.raises(UserError, match="expected a ROS 2 bag"):
        ros.open_log(tmp_path)
    (tmp_path / "empty").mkdir()
    assert ros.sniff(tmp_path / "empty") is None
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "first.mcap", alone)
    assert read(alone).problems == ("metadata.yaml: missing; the files were read without it",)


def test_what_is_no_bag(tmp_path):
    for name, content in {"a.mcap": b"", "b.db3": b"no sqlite", "c.bag": b"#ROSBAG", "d.txt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        assert ros.sniff(tmp_path / name) is None
        with pytest.raises(UserError, match="expected a ROS 2 bag"):
            ros.open_log(tmp_path / name)
    other = sqlite3.connect(tmp_path / "other.db3")
    other.execute("CREATE TABLE users (id INTEGER)")
    other.close()
    assert ros.sniff(tmp_path / "other.db3") is None
    assert ros.sniff(tmp_path / "absent.mcap") is None
    (tmp_path / "old.bag").write_bytes(b"#ROSBAG V1.2\n")
    assert "version 2.0" in read(tmp_path / "old.bag").reason


@pytest.mark.parametrize("plugin", [MCAP, SQLITE])
def test_a_bag_without_messages_is_refused(tmp_path, plugin):
    assert read(write_bag(tmp_path / "bag", [], plugin)) == Refused(name="bag", reason="no messages")


def test_a_ros1_bag_without_messages_is_refused(tmp_path):
    assert read(write_bag1(tmp_path / "a.bag", [])) == Refused(name="a.bag", reason="no messages")


def test_facts_and_hash_hold_no_place(tmp_path):
    first = read(write_bag(tmp_path / "one" / "bag", joint_messages()))
    shutil.copytree(tmp_path / "one" / "bag", tmp_path / "two" / "bag")
    second = read(tmp_path / "two" / "bag")
    assert first.sha256 == second.sha256 != ""
    assert str(tmp_path) not in repr(first.facts) + repr(first.problems)
    change_metadata(tmp_path / "two" / "bag", message_count=6, ros_distro="humble")
    assert read(tmp_path / "two" / "bag").sha256 != first.sha256


def same_streams(first, second):
    assert set(first.streams) == set(second.streams)
    for name, stream in first.streams.items():
        other = second.streams[name]
        assert (stream.kind, stream.names, stream.size, stream.schema) == (
            other.kind, other.names, other.size, other.schema)
        if stream.values is not None:
            np.testing.assert_array_equal(stream.values, other.values)


@needs_shared
def test_sample_rosbag2():
    bags = {storage: SHARED / "derived_g1_rosbag2" / storage for storage in ("mcap", "sqlite3")}
    episodes = {storage: read(path) for storage, path in bags.items()}
    same_streams(*episodes.values())
    for storage, episode in episodes.items():
        assert (episode.whole, episode.problems) == (True, ())
        with rosbag2.Reader(bags[storage]) as reader:
            assert {topic: facts["messages"] for topic, facts in episode.facts["topics"].items()} == {
                topic: information.msgcount for topic, information in reader.topics.items()}
            connections = [c for c in reader.connections if c.topic == "/joint_states"]
            wanted = [(time, ROS2.deserialize_cdr(data, connection.msgtype))
                      for connection, time, data in reader.messages(connections)]
        stream = episode.streams["/joint_states.position"]
        np.testing.assert_array_equal(stream.values, [message.position for _, message in wanted])
        start = episode.facts["start_ns"]
        np.testing.assert_allclose(stream.clocks["log"], [(time - start) / 1e9 for time, _ in wanted], atol=1e-9)
        stamps = [m.header.stamp.sec * SECOND + m.header.stamp.nanosec for _, m in wanted]
        np.testing.assert_allclose(stream.clocks["header"], [(stamp - start) / 1e9 for stamp in stamps], atol=1e-9)
        assert stream.names == tuple(wanted[0][1].name)
    pictures = [list(episode.streams["/cam_high/image/compressed"].pictures([0, 70, 144]))
                for episode in episodes.values()]
    np.testing.assert_array_equal(*pictures)
    assert pictures[0][0].shape == (480, 640, 3)


@needs_shared
def test_sample_with_messages_compressed():
    episode = read(SHARED / "amber_soccer")
    assert not episode.whole
    assert "metadata.yaml: names 13 files, 12 of them missing" in episode.problems
    stream = episode.streams["/camera/image_raw"]
    assert (len(stream), stream.size) == (2, (480, 640))
    for picture in stream.pictures([0, 1]):
        assert 10 < picture.std() < 120
    assert read(SHARED / "amber_soccer/soccer_goal_12.mcap").whole


@needs_shared
@pytest.mark.parametrize("name", ["example.bag", "example-lz4.bag", "example-bz2.bag"])
def test_sample_ros1(name):
    path = SHARED / "ros1_foxglove_fixtures" / name
    episode = read(path)
    assert (episode.whole, episode.problems) == (True, ())
    with rosbag1.Reader(path) as reader:
        counts = {topic: information.msgcount for topic, information in reader.topics.items()}
        assert {topic: facts["messages"] for topic, facts in episode.facts["topics"].items()} == counts
        connections = [c for c in reader.connections if c.topic == "/turtle1/cmd_vel"]
        times = [time for _, time, _ in reader.messages(connections)]
    stream = episode.streams["/turtle1/cmd_vel"]
    np.testing.assert_allclose(stream.clocks["log"], [(t - episode.facts["start_ns"]) / 1e9 for t in times], atol=1e-9)
    assert stream.names == TWIST
    assert len(episode.streams["/tf.turtle1"]) + len(episode.streams["/tf.turtle2"]) == counts["/tf"]
    same_streams(episode, read(path.with_name("example.bag")))


@needs_shared
def test_sample_without_messages():
    assert read(SHARED / "ros1_foxglove_fixtures/no-messages.bag").reason == "no messages"
