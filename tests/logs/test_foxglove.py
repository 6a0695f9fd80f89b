import base64
import io
import json
from contextlib import suppress

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.writer import CompressionType, Writer
from mcap_protobuf.decoder import DecoderFactory
from PIL import Image
from rosbags.typesys import Stores, get_typestore

from data.logs import foxglove, ros
from data.logs.streams import Kind, LogEpisode, Refused
from data.types import UserError

START = 1_700_000_000 * 10**9
STATE = {"type": "object", "properties": {"q": {"type": "array", "items": {"type": "number"}}}}


def write(path, messages, profile="", **options):
    """``messages``: (topic, encoding, schema name, schema encoding, schema, data, log time, publish time)."""
    with path.open("wb") as file:
        writer = Writer(file, **options)
        writer.start(profile=profile)
        schemas, channels = {}, {}
        for topic, encoding, name, schema_encoding, schema, data, log, publish in messages:
            if (name, schema) not in schemas:
                schemas[name, schema] = writer.register_schema(name, schema_encoding, schema) if name else 0
            if (topic, encoding) not in channels:
                channels[topic, encoding] = writer.register_channel(topic, encoding, schemas[name, schema])
            writer.add_message(channels[topic, encoding], log, data, publish)
        writer.finish()
    return path


def js(topic, value, time=START, name="my.State", schema=STATE, publish=None):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (topic, "json", name, "jsonschema", json.dumps(schema).encode(), data, time,
            time if publish is None else publish)


def read(path):
    (episode,) = foxglove.open_log(path).episodes()
    return episode


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


RGB = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
BASE64 = {"type": "object", "properties": {"data": {"type": "string", "contentEncoding": "base64"}}}


# JSON


def test_json_becomes_vectors(tmp_path):
    messages = [js("/state", {"timestamp": {"sec": START // 10**9 + i, "nsec": 5000}, "q": [i, -i], "on": i > 0,
                              "arm": {"grip": 0.5, "name": "left"}}, START + i * 10**8) for i in range(4)]
    path = write(tmp_path / "run.mcap", messages)
    assert (foxglove.sniff(path), ros.sniff(path)) == ("Foxglove MCAP", None)
    assert foxglove.open_log(path).format == "Foxglove MCAP"
    episode = read(path)
    assert (episode.name, episode.whole, episode.problems) == ("run.mcap", True, ())
    stream = episode.streams["/state"]
    assert (stream.names, stream.schema) == (("q[0]", "q[1]", "on", "arm.grip"), "my.State")
    assert stream.values.tolist() == [[i, -i, i > 0, 0.5] for i in range(4)]
    np.testing.assert_allclose(stream.clocks["log"], np.arange(4) / 10, atol=1e-9)
    np.testing.assert_allclose(stream.clocks["header"], np.arange(4) + 5e-6, atol=1e-9)
    assert set(stream.clocks) == {"header", "log"}
    assert episode.facts == {"start_ns": START, "topics": {"/state": {"type": "my.State", "messages": 4}}}


def test_publish_times_that_differ_are_a_clock(tmp_path):
    messages = [js("/a", {"q": [i]}, START + i, publish=START + i - 1_000_000) for i in range(3)]
    clocks = read(write(tmp_path / "run.mcap", [*messages, js("/b", {"q": [1]})])).streams
    np.testing.assert_allclose(clocks["/a"].clocks["publish"], np.arange(3) / 1e9 - 1e-3, atol=1e-12)
    assert set(clocks["/b"].clocks) == {"log"}


JSON_NUMBERS = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-2**53, 2**53) | st.booleans()


@settings(max_examples=25)
@given(st.lists(st.lists(JSON_NUMBERS, min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_number_survives(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("json") / "run.mcap"
    stream = read(write(path, [js("/q", {"q": row}) for row in rows])).streams["/q"]
    np.testing.assert_array_equal(stream.values, np.array(rows, float))


def test_null_is_a_missing_number_and_an_absent_field_another_message(tmp_path):
    values = [{"x": 1, "y": 2}, {"x": None, "y": 3}, {"x": 4}, {"y": 6, "x": 5}]
    episode = read(write(tmp_path / "run.mcap", [js("/p", value) for value in values]))
    np.testing.assert_array_equal(episode.streams["/p"].values, [[1, 2], [np.nan, 3], [5, 6]])
    assert episode.problems == ("/p: 1 messages whose names or number of values are not those of most",)


def test_json_without_a_schema_describes_itself(tmp_path):
    data = b'{"x": 1}'
    episode = read(write(tmp_path / "run.mcap", [("/p", "json", "", "", b"", data, START, START)]))
    assert episode.streams["/p"].values.tolist() == [[1]]


@pytest.mark.parametrize(("value", "reason"), [
    (b"{", "messages that cannot be decoded"), (b"\xff", "messages that cannot be decoded"),
    (b"[1, 2]", "messages that are no JSON objects"), ({"name": 1, "frame": "a"}, None), ({}, "without numbers"),
    ({"a": "x", "b": "y"}, "without numbers"), ({"q": [0] * 5000}, "with more than 4096 numbers"),
    (b'{"q": 1' + b"0" * 400 + b"}", "messages that cannot be decoded"), (b"[" * 100_000, "cannot be decoded"),
    (b'{"timestamp": {"sec": 1' + b"0" * 400 + b', "nsec": 0}, "q": 1}', "a time beyond 64 bits"),
    (b'{"timestamp": {"sec": "soon", "nsec": 0}, "q": 1}', "messages that cannot be decoded")])
def test_json_that_says_nothing(tmp_path, value, reason):
    episode = read(write(tmp_path / "run.mcap", [js("/p", value), js("/p", value)]))
    if reason is None:
        assert episode.streams["/p"].names == ("name",)
    else:
        assert "/p: 2 messages" in episode.reason
        assert reason in episode.reason
        assert episode.reason.isprintable()


@pytest.mark.parametrize("schema", [b"{", b"[]", b'{"properties": [1]}', b'{"properties": {"q": 1}}', b"\xff"])
def test_a_damaged_json_schema(tmp_path, schema):
    message = ("/p", "json", "my.State", "jsonschema", schema, b'{"q": 1}', START, START)
    assert read(write(tmp_path / "run.mcap", [message])).reason.endswith("/p: 1 messages whose JSON schema is damaged")


@pytest.mark.parametrize("schema", [BASE64, {"type": "object"}])
def test_pictures_in_json(tmp_path, schema):
    """In base64, which the schema should say."""
    compressed = {"timestamp": {"sec": 5, "nsec": 0}, "frame_id": "eye", "format": "png",
                  "data": base64.b64encode(png(RGB)).decode()}
    raw = {"width": 4, "height": 3, "encoding": "rgb8", "step": 12, "data": base64.b64encode(RGB.tobytes()).decode()}
    episode = read(write(tmp_path / "run.mcap", [
        js("/eye", compressed, name="foxglove.CompressedImage", schema=schema),
        js("/raw", raw, name="foxglove.RawImage", schema=schema)]))
    for name, stream in episode.streams.items():
        assert (name, stream.kind, stream.size) in (("/eye", Kind.IMAGE, (3, 4)), ("/raw", Kind.IMAGE, (3, 4)))
        (picture,) = stream.pictures([0])
        np.testing.assert_array_equal(picture, RGB)


def test_words(tmp_path):
    episode = read(write(tmp_path / "run.mcap", [js("/task", {"text": "fold"}), js("/task", {"text": ""})]))
    assert (episode.streams["/task"].kind, episode.streams["/task"].texts) == (Kind.TEXT, ("fold", ""))


def xyz(x, y, z):
    return {"x": x, "y": y, "z": z}


def test_transforms_and_poses(tmp_path):
    turn = {"w": 0.8, "x": 0, "y": 0, "z": 0.6}  # in no order
    frames = [{"timestamp": {"sec": START // 10**9 + 1, "nsec": 0}, "parent_frame_id": "base", "child_frame_id": child,
               "rotation": turn, "translation": xyz(1, 2, 3)} for child in ("hand", "eye")]
    pose = {"orientation": turn, "position": xyz(1, 2, 3)}
    episode = read(write(tmp_path / "run.mcap", [
        js("/tf", {"transforms": frames}, name="foxglove.FrameTransforms"),
        js("/one", frames[0], name="foxglove.FrameTransform"),
        js("/pose", {"timestamp": {"sec": 1, "nsec": 0}, "frame_id": "base", "pose": pose},
           name="foxglove.PoseInFrame"),
        js("/own", {"tip": pose, "flat": {"orientation": xyz(1, 2, 3), "position": 4}})]))
    assert list(episode.streams) == ["/tf.hand", "/tf.eye", "/one.hand", "/pose", "/own"]
    for name in ("/tf.hand", "/tf.eye", "/one.hand", "/pose"):
        assert episode.streams[name].names == ("x", "y", "z", "qx", "qy", "qz", "qw")
        assert episode.streams[name].values.tolist() == [[1, 2, 3, 0, 0, 0.6, 0.8]]
    assert episode.streams["/tf.eye"].clocks["header"].tolist() == [1]
    assert episode.streams["/own"].names[:2] == ("tip.x", "tip.y")
    assert episode.streams["/own"].names[7:] == ("flat.orientation.x", "flat.orientation.y", "flat.orientation.z",
                                                 "flat.position")


def test_joints(tmp_path):
    """Every field of a joint may be absent."""
    values = [{"joints": [{"name": "a", "position": 1, "effort": 5}, {"name": "b", "position": 2}]},
              {"joints": [{"name": "b", "position": 20}, {"name": "a", "position": 10, "effort": None}]},
              {"joints": []}]
    episode = read(write(tmp_path / "run.mcap", [js("/j", value, name="foxglove.JointStates") for value in values]))
    assert {name: (s.names, s.values.tolist()) for name, s in episode.streams.items()} == {
        "/j.position": (("a", "b"), [[1, 2], [10, 20]]), "/j.effort": (("a",), [[5]])}
    assert episode.problems == ("/j: 1 messages without values",)


def test_a_timestamp_that_is_a_number_is_one(tmp_path):
    stream = read(write(tmp_path / "run.mcap", [js("/q", {"timestamp": 12.5, "header": 3})])).streams["/q"]
    assert (stream.names, stream.values.tolist(), set(stream.clocks)) == (("timestamp", "header"), [[12.5, 3]], {"log"})


# Protobuf


def protobuf(extra=()):
    """Classes and descriptors of a package made here: ``my.State`` with everything, ``foxglove.CompressedImage``."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="my.proto", package="my", syntax="proto3")
    inner = file.message_type.add(name="Inner")
    inner.field.add(name="gain", number=1, type=field.TYPE_FLOAT, label=field.LABEL_OPTIONAL)
    state = file.message_type.add(name="State")
    entry = state.nested_type.add(name="TempEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_DOUBLE, label=field.LABEL_OPTIONAL)
    for number, (name, kind, label, of) in enumerate([
            ("q", field.TYPE_DOUBLE, field.LABEL_REPEATED, None),
            ("count", field.TYPE_INT64, field.LABEL_OPTIONAL, None),
            ("on", field.TYPE_BOOL, field.LABEL_OPTIONAL, None),
            ("name", field.TYPE_STRING, field.LABEL_OPTIONAL, None),
            ("inner", field.TYPE_MESSAGE, field.LABEL_OPTIONAL, ".my.Inner"),
            ("many", field.TYPE_MESSAGE, field.LABEL_REPEATED, ".my.Inner"),
            ("temp", field.TYPE_MESSAGE, field.LABEL_REPEATED, ".my.State.TempEntry"), *extra], 1):
        state.field.add(name=name, number=number, type=kind, label=label, type_name=of)
    image = descriptor_pb2.FileDescriptorProto(name="image.proto", package="foxglove", syntax="proto3",
                                               dependency=["google/protobuf/timestamp.proto"])
    message = image.message_type.add(name="CompressedImage")
    for number, (name, kind, of) in enumerate([
            ("timestamp", field.TYPE_MESSAGE, ".google.protobuf.Timestamp"), ("frame_id", field.TYPE_STRING, None),
            ("data", field.TYPE_BYTES, None), ("format", field.TYPE_STRING, None)], 1):
        message.field.add(name=name, number=number, type=kind, label=field.LABEL_OPTIONAL, type_name=of)
    from google.protobuf import timestamp_pb2

    stamp = descriptor_pb2.FileDescriptorProto.FromString(timestamp_pb2.DESCRIPTOR.serialized_pb)
    files = descriptor_pb2.FileDescriptorSet(file=[stamp, file, image])
    pool = descriptor_pool.DescriptorPool()
    for one in files.file:
        pool.Add(one)
    classes = {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name))
               for name in ("my.State", "my.Inner", "foxglove.CompressedImage")}
    return classes, files.SerializeToString()


CLASSES, DESCRIPTORS = protobuf()


def proto(topic, message, time=START, schema=DESCRIPTORS):
    data = message.SerializeToString()
    return (topic, "protobuf", message.DESCRIPTOR.full_name, "protobuf", schema, data, time, time)


def state(i=0, **other):
    inner = CLASSES["my.Inner"]
    return CLASSES["my.State"](**{
        "q": [i, -i], "count": 7, "on": False, "name": "left", "inner": inner(gain=0.5),
        "many": [inner(gain=1), inner()], "temp": {"b": 20.0, "a": 10.0}} | other)


def test_protobuf_becomes_vectors(tmp_path):
    """Zeros are on the wire as nothing, and are zeros."""
    path = write(tmp_path / "run.mcap", [proto("/s", state(i), START + i) for i in range(3)])
    stream = read(path).streams["/s"]
    assert stream.names == ("q[0]", "q[1]", "count", "on", "inner.gain", "many[0].gain", "many[1].gain", "temp.a",
                            "temp.b")
    assert stream.values.tolist() == [[i, -i, 7, 0, 0.5, 1, 0, 10, 20] for i in range(3)]
    with path.open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        wanted = [list(message.q) for *_, message in reader.iter_decoded_messages()]
    np.testing.assert_array_equal(stream.values[:, :2], wanted)


def test_an_absent_message_is_missing_not_zero(tmp_path):
    episode = read(write(tmp_path / "run.mcap", [proto("/s", message) for message in (
        state(1), state(2), CLASSES["my.State"](q=[3, -3], many=[CLASSES["my.Inner"]()] * 2, temp={"a": 1, "b": 2}))]))
    assert episode.streams["/s"].values[:, 0].tolist() == [1, 2]
    assert episode.problems == ("/s: 1 messages whose names or number of values are not those of most",)


def image(data, seconds=5):
    message = CLASSES["foxglove.CompressedImage"](frame_id="eye", format="png", data=data)
    message.timestamp.seconds = START // 10**9 + seconds
    return message


def test_pictures_in_protobuf(tmp_path):
    stream = read(write(tmp_path / "run.mcap", [proto("/eye", image(png(RGB), i), START + i) for i in range(4)],
                        chunk_size=1)).streams["/eye"]
    assert (stream.kind, stream.size, len(stream)) == (Kind.IMAGE, (3, 4), 4)
    np.testing.assert_allclose(stream.clocks["header"], np.arange(4), atol=1e-9)
    pictures = list(stream.pictures([0, 3, 3]))
    assert len(pictures) == 3
    for picture in pictures:
        np.testing.assert_array_equal(picture, RGB)


def test_binary_data_of_no_known_type_is_skipped(tmp_path):
    field = descriptor_pb2.FieldDescriptorProto
    classes, descriptors = protobuf(extra=[("blob", field.TYPE_BYTES, field.LABEL_OPTIONAL, None)])
    refused = read(write(tmp_path / "run.mcap", [proto("/s", classes["my.State"](blob=b"x"), schema=descriptors)]))
    assert refused.reason == "no topic that can be read; /s: 1 messages with binary data, of a type that has no rule"


@pytest.mark.parametrize("schema", [b"", b"\xff\xff", DESCRIPTORS[:40], DESCRIPTORS.replace(b"State", b"Stata")])
def test_damaged_descriptors(tmp_path, schema):
    refused = read(write(tmp_path / "run.mcap", [proto("/s", state(), schema=schema)]))
    assert "/s: 1 messages whose Protobuf schema is damaged" in refused.reason


def test_undecodable_topics_are_counted(tmp_path):
    episode = read(write(tmp_path / "run.mcap", [
        js("/good", {"q": 1}), ("/flat", "flatbuffer", "my.Flat", "flatbuffer", b"?", b"?", START, START),
        ("/bare", "protobuf", "", "", b"", b"", START, START), (*proto("/s", state())[:5], b"\x09", START, START)]))
    assert list(episode.streams) == ["/good"]
    problems = dict(problem.split(": ", 1) for problem in episode.problems)
    assert set(problems) == {"/flat", "/bare", "/s"}
    assert problems["/flat"].startswith("1 messages in 'flatbuffer' with a schema in 'flatbuffer', known are cdr, ros1")
    assert problems["/s"].startswith("1 messages that cannot be decoded")


# Files


def test_ros_and_foxglove_in_one_file(tmp_path):
    store = get_typestore(Stores.ROS2_HUMBLE)
    kind = "std_msgs/msg/Float64"
    number = bytes(store.serialize_cdr(store.types[kind](data=0.5), kind))
    path = write(tmp_path / "run.mcap", [
        ("/n", "cdr", kind, "ros2msg", store.generate_msgdef(kind, ros_version=2)[0].encode(), number, START, START),
        js("/q", {"q": 1}), proto("/s", state())], profile="ros2")
    assert (ros.sniff(path), foxglove.sniff(path)) == ("rosbag2 (mcap)", None)
    (episode,) = ros.open_log(path).episodes()
    assert list(episode.streams) == ["/n", "/q", "/s"]
    assert episode.problems == ()
    unmarked = write(tmp_path / "unmarked.mcap", [
        ("/n", "cdr", kind, "ros2msg", store.generate_msgdef(kind, ros_version=2)[0].encode(), number, START, START)])
    assert (ros.sniff(unmarked), foxglove.sniff(unmarked)) == ("rosbag2 (mcap)", None)


def test_what_is_no_mcap(tmp_path):
    (tmp_path / "a.mcap").write_bytes(b"")
    (tmp_path / "b.mcap").write_bytes(b"\x89MCAP1\r\n")
    for path in (tmp_path, tmp_path / "a.mcap", tmp_path / "b.mcap", tmp_path / "absent.mcap"):
        assert foxglove.sniff(path) is None
        with pytest.raises(UserError, match="expected a Foxglove MCAP file"):
            foxglove.open_log(path)


def test_no_messages(tmp_path):
    assert read(write(tmp_path / "run.mcap", [])) == Refused(name="run.mcap", reason="no messages")


def test_a_file_that_vanishes_is_refused(tmp_path):
    path = write(tmp_path / "run.mcap", [js("/q", {"q": 1})])
    log = foxglove.open_log(path)
    path.unlink()
    (refused,) = log.episodes()
    assert refused == Refused(name="run.mcap", reason="cannot be read (No such file or directory)")


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("compression", [CompressionType.NONE, CompressionType.ZSTD])
def test_damage_never_raises(tmp_path, chunked, compression):
    path = write(tmp_path / "run.mcap", [
        message for i in range(2) for message in (js("/q", {"q": [i]}), proto("/s", state(i)), proto("/eye", image(
            png(RGB))))], use_chunking=chunked, compression=compression, enable_crcs=False, chunk_size=300)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [content[:cut] for cut in np.linspace(0, len(content) - 1, 50).astype(int)]
    for place, bit in zip(rng.integers(0, len(content), 150), rng.integers(0, 8, 150), strict=True):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        damaged.append(bytes(changed))
    for found in damaged:
        path.write_bytes(found)
        if foxglove.sniff(path) is None:
            with pytest.raises(UserError, match="expected a Foxglove MCAP file"):
                foxglove.open_log(path)
            continue
        episode = read(path)
        if isinstance(episode, Refused):
            assert episode.reason.isprintable()
            continue
        assert isinstance(episode, LogEpisode)
        for stream in episode.streams.values():
            assert all(len(clock) == len(stream) > 0 for clock in stream.clocks.values())
            assert stream.values is None or stream.values.shape[0] == len(stream)
            for i in range(len(stream) if stream.pictures else 0):
                with suppress(ValueError):
                    assert next(stream.pictures([i])).ndim == 3
