"""Bags that are cut, damaged or hostile."""

import re
import sqlite3
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags import rosbag1

from data.logs import ros
from data.logs.streams import Refused
from data.types import UserError
from tests.logs.bags import (
    ROS1,
    ROS2,
    SQLITE,
    START,
    change_metadata,
    is_well_formed,
    joint_messages,
    joints,
    make,
    png,
    read,
    split_bag,
    write_bag,
    write_bag1,
    write_mcap,
)


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
