import io
import re
import shutil
import sqlite3
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from PIL import Image
from rosbags import rosbag1, rosbag2
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from data.logs import ros
from data.logs.streams import Kind, Refused
from data.types import UserError

SHARED = Path(__file__).parents[3] / "shared/logs"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample logs in ../shared/logs beside the repository")

SECOND = 10**9
START = 1_700_000_000 * SECOND
ROS2, ROS1 = get_typestore(Stores.ROS2_HUMBLE), get_typestore(Stores.ROS1_NOETIC)
KINDS = {"NAME": 2, "BASE": 1}
MCAP, SQLITE = StoragePlugin.MCAP, StoragePlugin.SQLITE3
STORAGES = [(MCAP, CompressionMode.NONE), (MCAP, CompressionMode.STORAGE), (MCAP, CompressionMode.MESSAGE),
            (MCAP, CompressionMode.FILE), (SQLITE, CompressionMode.NONE), (SQLITE, CompressionMode.MESSAGE),
            (SQLITE, CompressionMode.FILE)]


def make(kind, store=ROS2, /, **given):
    """A message with these fields, zero elsewhere."""
    values = {}
    for field, (node, of) in store.fielddefs[kind][1]:
        if field in given:
            values[field] = given[field]
        elif node.name == "NAME":
            values[field] = make(of, store)
        elif node.name == "BASE":
            values[field] = "" if of[0] == "string" else 0
        else:
            (item, base), size = of
            numbers = item.name == "BASE" and base[0] != "string"
            values[field] = np.zeros(size if node.name == "ARRAY" else 0, base[0]) if numbers else []
    return store.types[kind](**values)


def header(ns, store=ROS2, frame=""):
    stamp = make("builtin_interfaces/msg/Time", store, sec=ns // SECOND, nanosec=ns % SECOND)
    return make("std_msgs/msg/Header", store, stamp=stamp, frame_id=frame)


def vector3(x, y, z):
    return make("geometry_msgs/msg/Vector3", x=x, y=y, z=z)


def quaternion(x, y, z, w):
    return make("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def pose(x, y, z, qx, qy, qz, qw):
    return make("geometry_msgs/msg/Pose", position=make("geometry_msgs/msg/Point", x=x, y=y, z=z),
                orientation=quaternion(qx, qy, qz, qw))


def joints(position, ns=0, names=("a", "b"), store=ROS2, **other):
    return make("sensor_msgs/msg/JointState", store, header=header(ns, store), name=list(names),
                position=np.array(position, float), **other)


def joint_messages(count=6, store=ROS2):
    """Log times 0.1 s apart, headers 0.02 s before them, positions that count."""
    return [("/joints", "sensor_msgs/msg/JointState", START + i * SECOND // 10,
             joints([i, -i], START + i * SECOND // 10 - SECOND // 50, store=store)) for i in range(count)]


def write_bag(path, messages, plugin=MCAP, mode=CompressionMode.NONE, store=ROS2):
    """``messages``: (topic, type, log time in ns, message). A folder written by the library."""
    writer = rosbag2.Writer(path, version=9, storage_plugin=plugin)
    writer.set_compression(mode, CompressionFormat.ZSTD)
    with writer:
        known = {}
        for topic, kind, time, message in messages:
            if (topic, kind) not in known:
                known[topic, kind] = writer.add_connection(topic, kind, typestore=store)
            writer.write(known[topic, kind], time, store.serialize_cdr(message, kind))
    return path


def write_mcap(path, messages, chunk_size=1, cut=None, store=ROS2, **options):
    """One file, small chunks (each message closes one when ``chunk_size`` is 1); ``cut`` leaves out the end."""
    stream = io.BytesIO()
    writer = McapWriter(stream, chunk_size=chunk_size, **options)
    writer.start(profile="ros2")
    channels = {}
    for topic, kind, time, message in messages:
        if topic not in channels:
            text = store.generate_msgdef(kind, ros_version=2)[0].encode()
            schema = writer.register_schema(kind, "ros2msg", text)
            channels[topic] = writer.register_channel(topic, "cdr", schema)
        writer.add_message(channels[topic], time, bytes(store.serialize_cdr(message, kind)), time)
    writer.finish()
    path.write_bytes(stream.getvalue()[:cut])
    return path


def write_bag1(path, messages, compression=None):
    writer = rosbag1.Writer(path)
    if compression:
        writer.set_compression(compression)
    with writer:
        known = {}
        for topic, kind, time, message in messages:
            if topic not in known:
                known[topic] = writer.add_connection(topic, kind, typestore=ROS1)
            writer.write(known[topic], time, ROS1.serialize_ros1(message, kind))
    return path


def read(path):
    (episode,) = ros.open_log(path).episodes()
    return episode


def one(tmp_path, kind, *messages, topic="/t", store=ROS2):
    """The episode of a bag with one topic, a message per second."""
    return read(write_bag(tmp_path / "bag", [(topic, kind, START + i * SECOND, m) for i, m in enumerate(messages)],
                          store=store))


@contextmanager
def suppress_value_error(beginning):
    """Anything else, or a text that begins otherwise, is raised."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(beginning):
            raise


def is_well_formed(episode):
    """Lengths agree, and pictures can be decoded or say why not."""
    if isinstance(episode, Refused):
        assert episode.reason.isprintable()
        return
    assert episode.streams
    assert all(line.isprintable() for line in episode.problems)
    for name, stream in episode.streams.items():
        assert name == stream.name
        assert len(stream) > 0
        assert all(clock.shape == (len(stream),) and clock.dtype == np.float64 for clock in stream.clocks.values())
        if stream.kind is Kind.VECTOR:
            assert stream.values.shape[0] == len(stream)
            assert stream.values.dtype == np.float64
        elif stream.kind is Kind.TEXT:
            assert len(stream.texts) == len(stream)
        else:
            for i in range(len(stream)):
                picture = np.zeros((1, 1, 3), np.uint8)
                reason = f"{name}: message {i} cannot be decoded"
                with suppress_value_error(reason):
                    (picture,) = stream.pictures([i])
                assert picture.dtype == np.uint8
                assert picture.shape[2] == 3


# Files


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


def split_bag(tmp_path, parts=3, plugin=MCAP):
    """A bag of 12 messages and files ``run_0``, ``run_1``... with metadata for all of them."""
    messages = joint_messages(12)
    folder = tmp_path / "run"
    folder.mkdir()
    for i in range(parts):
        bag = write_bag(tmp_path / f"part{i}", messages[i * 12 // parts: (i + 1) * 12 // parts], plugin)
        (file,) = (file for file in bag.iterdir() if file.suffix != ".yaml")
        file.rename(folder / f"run_{i}{file.suffix}")
        information = yaml.safe_load((bag / "metadata.yaml").read_text())
    information = information["rosbag2_bagfile_information"]
    information["relative_file_paths"] = [f"run_{i}{file.suffix}" for i in range(parts)]
    information["message_count"] = 12
    information["topics_with_message_count"][0]["message_count"] = 12
    (folder / "metadata.yaml").write_text(yaml.safe_dump({"rosbag2_bagfile_information": information}))
    return folder


def change_metadata(folder, **changes):
    file = folder / "metadata.yaml"
    information = yaml.safe_load(file.read_text())
    information["rosbag2_bagfile_information"].update(changes)
    file.write_text(yaml.safe_dump(information))


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


# Cut and damaged files


@settings(max_examples=40)
@given(cut=st.floats(0, 1), compression=st.sampled_from(list(CompressionType)), chunked=st.booleans())
def test_a_cut_mcap_gives_its_first_messages(tmp_path_factory, cut, compression, chunked):
    path = tmp_path_factory.mktemp("cut") / "run.mcap"
    content = write_mcap(path, joint_messages(8), use_chunking=chunked, compression=compression).read_bytes()
    # Bodies of messages or chunks end here: a walk of our own over opcodes and lengths.
    ends, at = [], 8
    while at < len(content) - 8:
        opcode, length = struct.unpack_from("<BQ", content, at)
        at += 9 + length
        ends += [at] if opcode == (0x06 if chunked else 0x05) else []
    kept = 8 + int(cut * (len(content) - 9))
    path.write_bytes(content[:kept])
    expected = sum(end <= kept for end in ends)
    if expected == 0:
        assert ros.sniff(path) is None or "no messages" in read(path).reason
        return
    episode = read(path)
    assert not episode.whole
    assert "no footer, so the recording was cut" in episode.problems[0]
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(expected))


def test_a_cut_split_leaves_the_others(tmp_path):
    folder = split_bag(tmp_path)
    file = folder / "run_2.mcap"
    file.write_bytes(file.read_bytes()[:100])
    episode = read(folder)
    assert not episode.whole
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(8))
    assert any(problem.startswith("run_2.mcap: no footer") for problem in episode.problems)


def chunk_places(content):
    at = 8
    while at < len(content) - 8:
        opcode, length = struct.unpack_from("<BQ", content, at)
        if opcode == 0x06:
            yield at, length
        at += 9 + length


@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("compression", list(CompressionType))
def test_a_damaged_chunk_is_left_out(tmp_path, which, compression):
    """Also the first, which alone describes the channels besides the summary."""
    path = write_mcap(tmp_path / "run.mcap", joint_messages(8), compression=compression)
    content = bytearray(path.read_bytes())
    at, length = list(chunk_places(content))[which]
    content[at + 9 + length - 20] ^= 0x55
    path.write_bytes(content)
    episode = read(path)
    assert not episode.whole
    assert episode.problems[0].startswith("run.mcap: 1 damaged chunks, skipped; the first: ")
    values = episode.streams["/joints.position"].values[:, 0].tolist()
    assert values == [i for i in range(8) if i != which]


def test_chunks_without_crc_are_normal(tmp_path):
    path = write_mcap(tmp_path / "run.mcap", joint_messages(8), enable_crcs=False)
    assert (read(path).whole, read(path).problems) == (True, ())


def test_a_lost_message_is_noticed_by_the_counts(tmp_path):
    """A flipped opcode hides a chunk from every reader: unknown records are to be ignored."""
    path = write_mcap(tmp_path / "run.mcap", joint_messages(8))
    content = bytearray(path.read_bytes())
    content[list(chunk_places(content))[5][0]] = 0x86
    path.write_bytes(content)
    episode = read(path)
    assert (episode.whole, episode.problems) == (False, ("run.mcap: 7 messages found, its summary counts 8",))


@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_a_cut_sqlite_file_is_refused(tmp_path, share):
    path = write_bag(tmp_path / "bag", joint_messages(200), SQLITE)
    file = path / "bag.db3"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    for bag in (path, file):
        refused = read(bag)
        assert isinstance(refused, Refused)
        assert "damaged or cut sqlite3 file" in refused.reason


@pytest.mark.parametrize("instead", [b"TABL\xff topics", b"TABLE topicz"])
def test_a_damaged_sqlite_schema_is_refused(tmp_path, instead):
    """sqlite quotes what it cannot read, and its binding stumbles over bytes that are no text."""
    path = write_bag(tmp_path / "bag", joint_messages(), SQLITE)
    content = (path / "bag.db3").read_bytes()
    assert b"TABLE topics" in content
    (path / "bag.db3").write_bytes(content.replace(b"TABLE topics", instead))
    assert "bag.db3: damaged or cut sqlite3 file" in read(path).reason


def test_sqlite_is_read_without_writing_beside_it(tmp_path):
    path = write_bag(tmp_path / "bag", joint_messages(), SQLITE)
    file = (path / "bag.db3").rename(path / "100% #1?&mode=rwc.db3")
    assert len(read(file).streams["/joints.position"]) == 6
    change_metadata(path, relative_file_paths=[file.name])
    before = sorted(path.iterdir())
    assert read(path).problems == ()
    assert sorted(path.iterdir()) == before


def test_a_journal_that_was_not_applied_is_said(tmp_path):
    path = write_bag(tmp_path / "bag", joint_messages(), SQLITE)
    (path / "bag.db3-wal").write_bytes(b"frames")
    episode = read(path)
    assert not episode.whole
    assert "bag.db3-wal holds messages that were not read" in episode.problems[0]


@pytest.mark.parametrize("unclosed", [True, False])
def test_a_ros1_bag_that_was_not_closed(tmp_path, unclosed):
    """The recorder died: either the header has no place of the index, or the index was cut off."""
    path = write_bag1(tmp_path / "run.bag", joint_messages(2000, ROS1))
    content = bytearray(path.read_bytes())
    place = content.index(b"index_pos=") + len(b"index_pos=")
    (index,) = struct.unpack_from("<Q", content, place)
    if unclosed:
        content[place: place + 8] = bytes(8)
    path.write_bytes(content[:index])
    with pytest.raises(rosbag1.ReaderError), rosbag1.Reader(path):
        pass
    episode = read(path)
    assert not episode.whole
    assert "no whole index, so the recording was cut" in episode.problems[0]
    np.testing.assert_array_equal(episode.streams["/joints.position"].values[:, 0], np.arange(2000))
    path.write_bytes(content[: index // 2])
    assert "no messages; run.bag: no whole index" in read(path).reason  # all are in one chunk


def test_a_damaged_chunk_of_a_ros1_bag_is_left_out(tmp_path):
    path = tmp_path / "run.bag"
    writer = rosbag1.Writer(path)
    writer.set_compression(rosbag1.Writer.CompressionFormat.BZ2)
    writer.chunk_threshold = 1
    with writer:
        connection = writer.add_connection("/joints", "sensor_msgs/msg/JointState", typestore=ROS1)
        for _, kind, time, message in joint_messages(5, ROS1):
            writer.write(connection, time, ROS1.serialize_ros1(message, kind))
    content = bytearray(path.read_bytes())
    chunks = [match.start() for match in re.finditer(b"BZh", content)]
    assert len(chunks) == 5
    content[chunks[0] + 20] ^= 0xFF
    path.write_bytes(content)
    episode = read(path)
    assert (episode.whole, episode.streams["/joints.position"].values[:, 0].tolist()) == (False, [1, 2, 3, 4])
    assert episode.problems[0].startswith("run.bag: 1 damaged chunks")


def test_messages_of_a_ros1_chunk_that_was_never_closed(tmp_path):
    """rosbag writes the chunk's header with size 0 first, and the messages after it."""
    path = write_bag1(tmp_path / "run.bag", joint_messages(4, ROS1))
    content = path.read_bytes()
    name = content.index(b"compression=none")
    begin = content.rindex(struct.pack("<I", struct.unpack_from("<I", content, name - 4)[0]), 0, name)
    with rosbag1.Reader(path) as reader:
        (chunk,) = reader.chunks.values()
        (position,) = reader.chunks
    assert position <= begin
    place = content.index(b"index_pos=") + len(b"index_pos=")
    body = content[chunk.datapos: chunk.datapos + chunk.datasize]
    head = bytearray(content[: chunk.datapos])
    head[-4:] = bytes(4)
    size = head.index(b"size=", position) + 5
    head[size: size + 4] = bytes(4)
    head[place: place + 8] = bytes(8)
    path.write_bytes(bytes(head) + body)
    assert read(path).streams["/joints.position"].values[:, 0].tolist() == [0, 1, 2, 3]


def faults(content, flips=200):
    """The file cut at 50 places, and with single flipped bits."""
    rng = np.random.default_rng(0)
    for cut in np.linspace(0, len(content) - 1, 50).astype(int):
        yield content[:cut]
    for place, bit in zip(rng.integers(0, len(content), flips), rng.integers(0, 8, flips), strict=True):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        yield bytes(changed)


def mixed_messages(store=ROS2):
    data = png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    text = make("std_msgs/msg/String", store, data="pick up the cup")
    return [*joint_messages(3, store), ("/text", "std_msgs/msg/String", START, text),
            ("/camera", "sensor_msgs/msg/CompressedImage", START,
             make("sensor_msgs/msg/CompressedImage", store, format="png", data=np.frombuffer(data, np.uint8)))]


@pytest.mark.parametrize("kind", ["mcap", "mcap, no chunks", "db3", "bag", "bag, lz4", "yaml"])
def test_damage_never_raises(tmp_path, kind):
    if kind.startswith("mcap"):
        file = write_mcap(tmp_path / "run.mcap", mixed_messages(), use_chunking=kind == "mcap", enable_crcs=False)
        path = file
    elif kind.startswith("bag"):
        lz4 = rosbag1.Writer.CompressionFormat.LZ4 if "lz4" in kind else None
        path = file = write_bag1(tmp_path / "run.bag", mixed_messages(ROS1), lz4)
    else:
        path = write_bag(tmp_path / "bag", mixed_messages(), SQLITE)
        file = path / ("bag.db3" if kind == "db3" else "metadata.yaml")
    for content in faults(file.read_bytes()):
        file.write_bytes(content)
        if ros.sniff(path) is None:
            with pytest.raises(UserError, match="expected a ROS 2 bag"):
                ros.open_log(path)
        else:
            is_well_formed(read(path))


def test_a_message_that_cannot_be_decoded_is_counted(tmp_path):
    path = tmp_path / "run.mcap"
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start(profile="ros2")
        kind = "sensor_msgs/msg/JointState"
        schema = writer.register_schema(kind, "ros2msg", ROS2.generate_msgdef(kind, ros_version=2)[0].encode())
        channels = {
            "/good": writer.register_channel("/good", "cdr", schema),
            "/bare": writer.register_channel("/bare", "cdr", 0),
            "/xml": writer.register_channel("/xml", "xml", schema),
            "/broken": writer.register_channel("/broken", "cdr", writer.register_schema(
                "my/msg/Broken", "ros2msg", b"float64[ x")),
            "/nested": writer.register_channel("/nested", "cdr", writer.register_schema(
                "my/msg/Nested", "ros2msg", b"Lost item")),
        }
        for channel in channels.values():
            for i in range(3):
                data = bytes(ROS2.serialize_cdr(joints([i, i]), kind))
                writer.add_message(channel, START + i, data[: 40 if i == 1 else None], START + i)
        writer.finish()
    episode = read(path)
    assert list(episode.streams) == ["/good.position"]
    assert episode.streams["/good.position"].values[:, 0].tolist() == [0, 2]
    assert episode.facts["topics"]["/good"]["messages"] == 3
    problems = dict(problem.split(": ", 1) for problem in episode.problems)
    assert problems["/good"].startswith("1 messages that cannot be decoded; the first: ")
    assert problems["/bare"] == "3 messages without a schema"
    assert problems["/xml"].startswith("3 messages in 'xml' with a schema in 'ros2msg', known are ")
    assert problems["/broken"] == "3 messages of type my/msg/Broken, whose definition is missing or damaged"
    assert problems["/nested"] == "3 messages of type my/msg/Nested, whose definition is missing or damaged"


@pytest.mark.parametrize("definition", [
    "string X=\"\"\"\nimport os\nos.abort()\n\"\"\"", "string X='\\'); __import__('os').abort() #'\nfloat64 x",
    "float64 x):\n  __import__('os').abort()", "Other[4000000000] items\n" + "=" * 80 + "\nMSG: my/Other\nfloat64 x",
    "Hostile item\n"])
def test_a_hostile_definition_does_nothing(tmp_path, definition):
    """The library makes code of definitions; what it makes of these is not run, or harmless, and never long."""
    path = tmp_path / "run.mcap"
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start(profile="ros2")
        channel = writer.register_channel("/x", "cdr", writer.register_schema(
            "my/msg/Hostile", "ros2msg", definition.encode()))
        writer.add_message(channel, START, bytes(12), START)
        writer.finish()
    is_well_formed(read(path))


def test_hostile_names_become_no_streams(tmp_path):
    messages = [(topic, "std_msgs/msg/Bool", START, make("std_msgs/msg/Bool", data=1))
                for topic in ("/../../etc/passwd", "/a\nb", "/ok")]
    episode = read(write_mcap(tmp_path / "run.mcap", messages))
    assert list(episode.streams) == ["/ok"]
    assert episode.problems == ("/../../etc/passwd: 1 messages of a hostile name",
                                "'/a\\nb: 1 messages of a hostile name'")


IDL = "=" * 80 + """
IDL: my/msg/State
#include "my/msg/Tip.idl"
module my { module msg {
  typedef double double__2[2];
  struct State { my::msg::Tip tip; double__2 q; sequence<float> more; };
}; };
""" + "=" * 80 + """
IDL: my/msg/Tip
module my { module msg { struct Tip { float x; }; }; };
"""


@pytest.mark.parametrize(("encoding", "schema_encoding", "definition"), [
    ("cdr", "ros2idl", IDL), ("cdr", "ros2msg", "Tip tip\nfloat64[2] q\nfloat32[] more\n" + "=" * 80 +
                              "\nMSG: my/Tip\nfloat32 x"),
    ("ros1", "ros1msg", "Tip tip\nfloat64[2] q\nfloat32[] more\n" + "=" * 80 + "\nMSG: my/Tip\nfloat32 x")])
def test_every_kind_of_definition(tmp_path, encoding, schema_encoding, definition):
    """Bytes packed by hand."""
    data = {"cdr": b"\0\1\0\0" + struct.pack("<f4x2dI2f", 0.5, 1, 2, 2, 3, 4),
            "ros1": struct.pack("<f2dI2f", 0.5, 1, 2, 2, 3, 4)}[encoding]
    path = tmp_path / "run.mcap"
    with path.open("wb") as file:
        writer = McapWriter(file)
        writer.start(profile="")
        schema = writer.register_schema("my/msg/State", schema_encoding, definition.encode())
        writer.add_message(writer.register_channel("/s", encoding, schema), START, data, START)
        writer.finish()
    assert ros.sniff(path) == "rosbag2 (mcap)"
    stream = read(path).streams["/s"]
    assert stream.names == ("tip.x", "q[0]", "q[1]", "more[0]", "more[1]")
    assert stream.values.tolist() == [[0.5, 1, 2, 3, 4]]


def test_an_old_bag_has_no_definitions(tmp_path):
    """As ROS 2 Foxy to Humble wrote them: three columns and no schema table."""
    path = tmp_path / "old.db3"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE topics(id INTEGER PRIMARY KEY, name TEXT, type TEXT, serialization_format TEXT, "
                     "offered_qos_profiles TEXT)")
    database.execute("CREATE TABLE messages(id INTEGER PRIMARY KEY, topic_id INTEGER, timestamp INTEGER, data BLOB)")
    database.execute("INSERT INTO topics VALUES (1, '/joints', 'sensor_msgs/msg/JointState', 'cdr', '')")
    database.execute("INSERT INTO topics VALUES (2, '/own', 'my_msgs/msg/Own', 'cdr', '')")
    for _, kind, time, message in joint_messages(3):
        database.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (1, ?, ?)",
                         (time, bytes(ROS2.serialize_cdr(message, kind))))
    database.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (2, ?, x'00010000')", (START,))
    database.execute("INSERT INTO messages (topic_id, timestamp, data) VALUES (3, ?, 'text')", (START,))
    database.commit()
    database.close()
    episode = read(path)
    assert episode.streams["/joints.position"].values[:, 0].tolist() == [0, 1, 2]
    assert episode.problems == (
        "/own: 1 messages of type my_msgs/msg/Own, whose definition is missing or damaged", "old.db3: 1 damaged rows")


# Messages


def test_joints_are_matched_by_name(tmp_path):
    episode = one(tmp_path, "sensor_msgs/msg/JointState", joints([1, 2], velocity=np.array([3.0, 4])),
                  joints([20, 10], names=("b", "a"), effort=np.array([6.0, 5])), joints([5, 6], names=("a", "c")),
                  joints([7]), joints([], names=()))
    assert episode.streams["/t.position"].values.tolist() == [[1, 2], [10, 20]]
    assert episode.streams["/t.position"].names == ("a", "b")
    assert episode.streams["/t.velocity"].values.tolist() == [[3, 4]]
    assert episode.streams["/t.effort"].values.tolist() == [[6, 5]]
    assert episode.streams["/t.effort"].clocks["log"].tolist() == [1]
    other = "2 messages whose names or number of values are not those of most"
    assert episode.problems == ("/t: 1 messages without values", f"/t.position: {other}")


def test_names_that_do_not_fit_the_values_are_kept(tmp_path):
    stream = one(tmp_path, "sensor_msgs/msg/JointState", joints([1, 2, 3])).streams["/t.position"]
    assert (stream.names, stream.values.tolist()) == (("a", "b"), [[1, 2, 3]])


def test_numbers_and_words(tmp_path):
    kinds = {"Bool": True, "Int8": -3, "UInt64": 7, "Float32": 0.5, "Float64": -2.5, "String": "go"}
    episode = read(write_bag(tmp_path / "bag", [
        (f"/{kind}", f"std_msgs/msg/{kind}", START, make(f"std_msgs/msg/{kind}", data=value))
        for kind, value in kinds.items()]))
    for kind, value in kinds.items():
        stream = episode.streams[f"/{kind}"]
        if kind == "String":
            assert (stream.kind, stream.texts) == (Kind.TEXT, ("go",))
        else:
            assert (stream.names, stream.values.tolist()) == (("data",), [[value]])


@pytest.mark.parametrize(("labels", "names"), [
    (("x", "y", "z"), ("x", "y", "z")), (("arm",), ("arm[0]", "arm[1]", "arm[2]")), (("a", "b"), ()), ((), ()),
    (("",), ())])
def test_arrays_are_named_by_their_layout(tmp_path, labels, names):
    dims = [make("std_msgs/msg/MultiArrayDimension", label=label) for label in labels]
    layout = make("std_msgs/msg/MultiArrayLayout", dim=dims)
    message = make("std_msgs/msg/Float32MultiArray", layout=layout, data=np.array([1, 2, 3], np.float32))
    stream = one(tmp_path, "std_msgs/msg/Float32MultiArray", message).streams["/t"]
    assert (stream.names, stream.values.tolist()) == (names, [[1, 2, 3]])


def test_arrays_of_changing_length(tmp_path):
    messages = [make("std_msgs/msg/Float64MultiArray", data=np.arange(n, dtype=float)) for n in (2, 3, 3, 0)]
    episode = one(tmp_path, "std_msgs/msg/Float64MultiArray", *messages)
    assert episode.streams["/t"].values.shape == (2, 3)
    assert len(episode.problems) == 2


TWIST = ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")
POSE = ("x", "y", "z", "qx", "qy", "qz", "qw")


def twist():
    return make("geometry_msgs/msg/Twist", linear=vector3(1, 2, 3), angular=vector3(4, 5, 6))


def transform(child, ns=START):
    inner = make("geometry_msgs/msg/Transform", translation=vector3(1, 2, 3), rotation=quaternion(0, 0, 0.6, 0.8))
    return make("geometry_msgs/msg/TransformStamped", header=header(ns), child_frame_id=child, transform=inner)


GIVEN_POSE, POSE_VALUES = pose(1, 2, 3, 0, 0, 0.6, 0.8), [1, 2, 3, 0, 0, 0.6, 0.8]
STAMP = header(START + SECOND)


@pytest.mark.parametrize(("kind", "given", "expected"), [
    ("geometry_msgs/msg/Twist", vars(twist()), {"": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/TwistStamped", {"header": STAMP, "twist": twist()}, {"": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/Pose", vars(GIVEN_POSE), {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/PoseStamped", {"header": STAMP, "pose": GIVEN_POSE}, {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/PoseWithCovarianceStamped",
     {"header": STAMP, "pose": make("geometry_msgs/msg/PoseWithCovariance", pose=GIVEN_POSE)},
     {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/Wrench", {"force": vector3(1, 2, 3), "torque": vector3(4, 5, 6)},
     {"": (("force.x", "force.y", "force.z", "torque.x", "torque.y", "torque.z"), [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/PointStamped", {"header": STAMP}, {"": (("x", "y", "z"), [0, 0, 0])}),
    ("nav_msgs/msg/Odometry",
     {"header": STAMP, "pose": make("geometry_msgs/msg/PoseWithCovariance", pose=GIVEN_POSE),
      "twist": make("geometry_msgs/msg/TwistWithCovariance", twist=twist())},
     {".pose": (POSE, POSE_VALUES), ".twist": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/TransformStamped", vars(transform("hand")), {".hand": (POSE, POSE_VALUES)}),
    ("tf2_msgs/msg/TFMessage", {"transforms": [transform("hand"), transform("eye")]},
     {".hand": (POSE, POSE_VALUES), ".eye": (POSE, POSE_VALUES)}),
    ("sensor_msgs/msg/Imu", {"orientation": quaternion(0, 0, 0.6, 0.8), "angular_velocity": vector3(1, 2, 3)},
     {".orientation": (("x", "y", "z", "w"), [0, 0, 0.6, 0.8]), ".angular_velocity": (("x", "y", "z"), [1, 2, 3]),
      ".linear_acceleration": (("x", "y", "z"), [0, 0, 0])}),
    ("sensor_msgs/msg/Imu", {"orientation_covariance": np.array([-1.0] + [0] * 8)},
     {".angular_velocity": (("x", "y", "z"), [0, 0, 0]), ".linear_acceleration": (("x", "y", "z"), [0, 0, 0])}),
    ("sensor_msgs/msg/Joy", {"axes": np.array([0.5, -1], np.float32), "buttons": np.array([1], np.int32)},
     {".axes": ((), [0.5, -1]), ".buttons": ((), [1])}),
    ("trajectory_msgs/msg/JointTrajectory",
     {"joint_names": ["a", "b"], "points": [
         make("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([1.0, 2]), effort=np.array([3.0, 4])),
         make("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([5.0, 6]))]},
     {".positions": (("a", "b"), [1, 2]), ".effort": (("a", "b"), [3, 4])}),
    ("trajectory_msgs/msg/JointTrajectoryPoint", {"velocities": np.array([1.0, 2])}, {".velocities": ((), [1, 2])}),
    ("builtin_interfaces/msg/Duration", {"sec": 2, "nanosec": 500_000_000}, {"": (("",), [2.5])}),
    ("sensor_msgs/msg/Range", {"header": STAMP, "range": 0.5},
     {"": (("radiation_type", "field_of_view", "min_range", "max_range", "range"), [0, 0, 0, 0, 0.5])}),
    ("geometry_msgs/msg/Polygon", {"points": [make("geometry_msgs/msg/Point32", x=1, y=2, z=3)]},
     {"": (("points[0].x", "points[0].y", "points[0].z"), [1, 2, 3])}),
])
def test_types_that_robots_speak(tmp_path, kind, given, expected):
    message = make(kind, **{key: value for key, value in given.items() if not key.startswith("__")})
    episode = one(tmp_path, kind, message, message)
    assert {stream.removeprefix("/t") for stream in episode.streams} == set(expected)
    for suffix, (names, values) in expected.items():
        stream = episode.streams["/t" + suffix]
        assert stream.names == names
        np.testing.assert_array_equal(stream.values, [values, values])
    if "header" in given:
        seconds = 0 if kind.endswith("TransformStamped") else 1
        assert episode.streams["/t" + suffix].clocks["header"].tolist() == [seconds, seconds]


def test_a_type_of_ones_own(tmp_path):
    store = get_typestore(Stores.ROS2_HUMBLE)
    store.register(get_types_from_msg(
        "uint8 OPEN=1\nstd_msgs/Header header\nstring label\nMotor[2] motor\nbool on\ngeometry_msgs/Pose tip\n"
        "builtin_interfaces/Duration age\n" + "=" * 80 + "\nMSG: my/Motor\nfloat32 q\nfloat32 dq", "my/msg/State"))
    motors = [make("my/msg/Motor", store, q=1.5, dq=2), make("my/msg/Motor", store, q=3, dq=4)]
    message = make("my/msg/State", store, header=header(START, store), label="ready", motor=motors, on=True,
                   tip=GIVEN_POSE, age=make("builtin_interfaces/msg/Duration", store, sec=3, nanosec=0))
    stream = one(tmp_path, "my/msg/State", message, store=store).streams["/t"]
    assert stream.names == ("motor[0].q", "motor[0].dq", "motor[1].q", "motor[1].dq", "on",
                            *(f"tip.{axis}" for axis in POSE), "age")
    assert stream.values.tolist() == [[1.5, 2, 3, 4, 1, *POSE_VALUES, 3]]
    assert stream.clocks["header"].tolist() == [0]


@pytest.mark.parametrize(("kind", "given", "reason"), [
    ("sensor_msgs/msg/PointCloud2", {"data": np.zeros(5000, np.uint8)}, "with more than 4096 numbers"),
    ("std_msgs/msg/Empty", {}, "without numbers"),
    ("trajectory_msgs/msg/JointTrajectory", {}, "without points"),
    ("std_msgs/msg/Float32MultiArray", {}, "without values"),
    ("sensor_msgs/msg/Image", {"encoding": "bayer_rggb8"}, "with encoding 'bayer_rggb8', known are mono8, rgb8"),
    ("sensor_msgs/msg/Image", {"encoding": "16UC1"}, "with encoding '16UC1', known are mono8, rgb8"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8", "height": 2, "width": 2, "step": 6,
                               "data": np.zeros(11, np.uint8)}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8", "height": 2, "width": 2, "step": 5,
                               "data": np.zeros(99, np.uint8)}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8"}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "yuv422", "height": 1, "width": 3, "step": 6,
                               "data": np.zeros(6, np.uint8)}, "in YUV 4:2:2 with an odd width"),
    ("sensor_msgs/msg/CompressedImage", {"format": "16UC1; compressedDepth", "data": np.zeros(30, np.uint8)},
     "whose pictures are neither JPEG nor PNG"),
])
def test_what_becomes_no_stream(tmp_path, kind, given, reason):
    refused = one(tmp_path, kind, make(kind, **given), make(kind, **given))
    assert refused.reason.startswith(f"no topic that can be read; /t: 2 messages {reason}")


def test_two_types_on_one_topic(tmp_path):
    messages = [("/t", "std_msgs/msg/Bool", START, make("std_msgs/msg/Bool", data=True)),
                ("/t", "std_msgs/msg/Float64", START, make("std_msgs/msg/Float64", data=0.5))]
    episode = read(write_bag(tmp_path / "bag", messages))
    assert episode.streams["/t"].values.tolist() == [[1]]
    assert episode.problems[0] == ("/t: 1 messages of type std_msgs/msg/Float64, where others of /t are "
                                   "std_msgs/msg/Bool")


# Pictures


def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG") if mode else Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def raw(encoding, pixels, padding=0):
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (0, padding)), constant_values=99)
    return make("sensor_msgs/msg/Image", header=header(START), height=height, width=width, encoding=encoding,
                step=rows.shape[1], data=rows.reshape(-1))


RGB = np.random.default_rng(1).integers(0, 256, (3, 4, 3), np.uint8)
ALPHA = np.full((3, 4, 1), 7, np.uint8)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("encoding", "pixels"), [
    ("rgb8", RGB), ("bgr8", RGB[:, :, ::-1]), ("rgba8", np.concatenate([RGB, ALPHA], 2)),
    ("bgra8", np.concatenate([RGB[:, :, ::-1], ALPHA], 2)), ("mono8", RGB[:, :, :1])])
def test_raw_pictures(tmp_path, encoding, pixels, padding):
    stream = one(tmp_path, "sensor_msgs/msg/Image", raw(encoding, pixels, padding)).streams["/t"]
    assert (stream.kind, stream.size, len(stream)) == (Kind.IMAGE, (3, 4), 1)
    (picture,) = stream.pictures([0])
    np.testing.assert_array_equal(picture, RGB[:, :, :1].repeat(3, 2) if encoding == "mono8" else RGB)
    picture[:] = 0  # the caller's to change


def test_yuv_pictures(tmp_path):
    """BT.601, limited range: Y 81, U 90, V 240 is red."""
    yuyv = np.tile(np.array([[81, 90], [81, 240]], np.uint8), (2, 2, 1))
    for encoding, pixels in (("yuv422_yuy2", yuyv), ("yuyv", yuyv), ("yuv422", yuyv[:, :, ::-1]),
                             ("uyvy", yuyv[:, :, ::-1])):
        path = tmp_path / encoding
        path.mkdir()
        (picture,) = one(path, "sensor_msgs/msg/Image", raw(encoding, pixels)).streams["/t"].pictures([0])
        assert np.abs(picture.astype(int) - [255, 0, 0]).max() <= 4


def compressed(data, layout="png"):
    return make("sensor_msgs/msg/CompressedImage", format=layout, data=np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(("plugin", "mode"), STORAGES, ids=lambda value: value.name)
def test_pictures_on_demand(tmp_path, plugin, mode):
    """In any file, chosen ones, repeated ones, and after the log object is gone."""
    frames = [np.full((2, 3, 3), 10 * i, np.uint8) for i in range(5)]
    messages = [("/t", "sensor_msgs/msg/CompressedImage", START + i, compressed(png(frame)))
                for i, frame in enumerate(frames)]
    stream = read(write_bag(tmp_path / "bag", messages, plugin, mode)).streams["/t"]
    assert stream.size == (2, 3)
    shown = [picture[0, 0, 0] for picture in stream.pictures([0, 0, 2, 4, 4])]
    assert shown == [0, 0, 20, 40, 40]
    assert list(stream.pictures([])) == []


def test_pictures_of_a_ros1_bag(tmp_path):
    message = make("sensor_msgs/msg/CompressedImage", ROS1, format="png", data=np.frombuffer(png(RGB), np.uint8))
    path = write_bag1(tmp_path / "a.bag", [("/t", "sensor_msgs/msg/CompressedImage", START + i, message)
                                           for i in range(3)], rosbag1.Writer.CompressionFormat.LZ4)
    for picture in read(path).streams["/t"].pictures([0, 2]):
        np.testing.assert_array_equal(picture, RGB)


def test_pictures_of_split_files(tmp_path):
    messages = [("/t", "sensor_msgs/msg/CompressedImage", START + i, compressed(png(np.full((2, 2, 3), i, np.uint8))))
                for i in range(4)]
    (tmp_path / "run").mkdir()
    write_mcap(tmp_path / "run/run_0.mcap", messages[:2])
    write_mcap(tmp_path / "run/run_1.mcap", messages[2:], use_chunking=False)
    stream = read(tmp_path / "run").streams["/t"]
    assert [picture[0, 0, 0] for picture in stream.pictures([0, 1, 2, 3])] == [0, 1, 2, 3]
    (tmp_path / "run/run_1.mcap").unlink()
    assert len(list(stream.pictures([0, 1]))) == 2
    with pytest.raises(ValueError, match="/t: message 2 cannot be decoded"):
        list(stream.pictures([2]))


def test_pictures_that_differ_in_size(tmp_path):
    episode = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(png(RGB)), compressed(png(RGB[:2])))
    assert episode.streams["/t"].size is None
    assert [picture.shape for picture in episode.streams["/t"].pictures([0, 1])] == [(3, 4, 3), (2, 4, 3)]


def test_a_picture_that_cannot_be_decoded_says_so(tmp_path):
    whole = png(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    episode = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(whole), compressed(whole[:200]))
    pictures = episode.streams["/t"].pictures([0, 1])
    assert next(pictures).shape == (16, 16, 3)
    with pytest.raises(ValueError, match="/t: message 1 cannot be decoded"):
        next(pictures)


def test_depth_is_no_picture(tmp_path):
    depth = Image.fromarray(np.full((4, 4), 1000, np.uint16))
    buffer = io.BytesIO()
    depth.save(buffer, "PNG")
    refused = one(tmp_path, "sensor_msgs/msg/CompressedImage", compressed(buffer.getvalue()))
    assert "with depth, not colour" in refused.reason


def test_a_file_that_is_compressed_and_cut(tmp_path):
    path = write_bag(tmp_path / "bag", joint_messages(20_0), MCAP, CompressionMode.FILE)
    (file,) = path.glob("*.zstd")
    file.write_bytes(file.read_bytes()[:-200])
    episode = read(path)
    assert isinstance(episode, Refused) or not episode.whole


# Samples


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
