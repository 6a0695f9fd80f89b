"""ROS bags as tests make them, and what any reading of one must be."""

import io
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from mcap.writer import Writer as McapWriter
from PIL import Image
from rosbags import rosbag1, rosbag2
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin
from rosbags.typesys import Stores, get_typestore

from data.logs import ros
from data.logs.streams import Kind, Refused
from tests.logs.damage import well_formed

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
    """What holds of every log's episode, and what a bag's has beside: something to read, and words to print."""
    well_formed([episode])
    if isinstance(episode, Refused):
        assert episode.reason.isprintable()
        return
    assert episode.streams
    assert all(line.isprintable() for line in episode.problems)
    for name, stream in episode.streams.items():
        assert len(stream) > 0
        assert all(clock.shape == (len(stream),) and clock.dtype == np.float64 for clock in stream.clocks.values())
        if stream.kind is Kind.IMAGE:
            for i in range(len(stream)):
                with suppress_value_error(f"{name}: message {i} cannot be decoded"):
                    stream.pictures([i])


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


def png(pixels, mode=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG") if mode else Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def compressed(data, layout="png"):
    return make("sensor_msgs/msg/CompressedImage", format=layout, data=np.frombuffer(data, np.uint8))

TWIST = ("linear.x", "linear.y", "linear.z", "angular.x", "angular.y", "angular.z")

POSE = ("x", "y", "z", "qx", "qy", "qz", "qw")

RGB = np.random.default_rng(1).integers(0, 256, (3, 4, 3), np.uint8)
