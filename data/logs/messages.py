"""Decoded messages of ROS and Foxglove topics as streams, whatever file and encoding they came in.

A decoder makes a tree of a message's bytes: dicts, lists, NumPy arrays, numbers, strings and bytes by field name.
The types that robots speak have a rule in ``RULES``; the numbers of any other become a vector with dotted names.
"""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import av
import numpy as np
from jaxtyping import Float64, Int64, UInt8
from PIL import Image, UnidentifiedImageError

from data.logs.pictures import rgb
from data.logs.streams import Kind, LogEpisode, Pictures, Refused, Size, Stream
from data.logs.unchanged import SeenFile, see
from data.text import one_line

Tree = dict[str, Any]
Decode = Callable[[bytes], Tree]
"""Raises nearly anything on corrupt bytes."""
Place = tuple[int, int]
"""Where a file finds a message again; only the file knows what it means."""

LARGEST_VECTOR = 4096
"""Numbers in a message; more are a point cloud or a map, not a state."""
POSE = ("x", "y", "z", "qx", "qy", "qz", "qw")
BYTES_PER_PIXEL = {"mono8": 1, "rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "yuv422": 2, "uyvy": 2, "yuv422_yuy2": 2,
                   "yuyv": 2}
"""Encodings of raw images; ``yuv422`` is UYVY."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What a file says of the messages of a topic."""

    topic: str
    type: str
    """Name of the schema: ``sensor_msgs/msg/JointState``, ``foxglove.RawImage``; empty where there is none."""
    encoding: str
    """Of the messages: ``cdr``, ``ros1``, ``json``, ``protobuf``."""
    schema_encoding: str
    definition: bytes
    """The schema; empty where the file has none."""


class RawMessage(NamedTuple):
    """A message as recorded. Times in ns."""

    channel: Channel
    log: int
    publish: int
    data: bytes
    place: Place


@runtime_checkable
class LogFile(Protocol):
    """A file of messages. Can be pickled."""

    name: str
    path: Path

    def messages(self, report: Report) -> Iterator[RawMessage]:
        """In the order of the file. Raises ``DamagedError`` when it cannot be read."""
        ...

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """Data of the messages at these places. Raises nearly anything when the file has changed."""
        ...


class DamagedError(Exception):
    """Bytes that are not what their format wants. One line for people."""


class UnusableError(Exception):
    """A message that becomes no stream. Says why in words that are the same for all messages of a kind."""


@dataclass(kw_only=True)
class Report:
    """What was skipped or lost, and where."""

    whole: bool = True
    _counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    _examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def count(self, where: str, what: str, example: str = "", *, number: int = 1, lost: bool = False) -> None:
        """So many more of ``what``; only the first example is kept. ``lost``: the episode is no longer whole."""
        self._counts[where, what] += number
        self._examples.setdefault((where, what), example)
        self.whole &= not lost

    def note(self, where: str, what: str, *, lost: bool = False) -> None:
        """Say something once."""
        self._counts[where, what] = 0
        self.whole &= not lost

    def lines(self) -> tuple[str, ...]:
        """For people: ``/tf: 12 messages without a schema``."""
        lines = (f"{where}: " + (f"{count} " if count else "") + what +
                 (f"; the first: {example}" if (example := self._examples.get((where, what))) else "")
                 for (where, what), count in self._counts.items())
        return tuple(line if line.isprintable() else ascii(line) for line in lines)


class Part(NamedTuple):
    """What a message says to one stream."""

    suffix: str
    """Of the stream's name, after the topic."""
    kind: Kind
    value: Any
    """Of a vector float64 [d], of a text its words, of an image (height, width)."""
    names: tuple[str, ...] = ()
    stamp: int = 0
    """Of the header, in ns; 0 where it has none."""


class _Row(NamedTuple):
    """A part and where it comes from."""

    part: Part
    message: RawMessage
    file: LogFile


def read_episode(
    name: str, files: Sequence[LogFile], decoder: Callable[[Channel], Decode], *, report: Report,
    facts: Mapping[str, Any], sha256: str
) -> LogEpisode | Refused:
    """Every message of the files as one episode. ``decoder`` raises ``UnusableError`` for a channel it cannot decode.

    Times are seconds since the first log time, ``start_ns`` of the facts, which also count the messages of each topic.
    """
    gathered = _Gathered(decoder, report)
    seen = {}
    for file in files:
        try:
            seen[file.path] = see(file.path)
            for message in file.messages(report):
                gathered.add(file, message)
        except (DamagedError, OSError) as error:
            report.note(file.name, one_line(error), lost=True)
    if not gathered.topics:
        return Refused(name=name, reason="; ".join(["no messages", *report.lines()]))
    streams = {name: _stream(name, rows, gathered.start, report) if rows[0].part.kind is not Kind.IMAGE else
               _camera(name, rows, gathered.start, report, BagPictures.of(name, rows, decoder, seen))
               for name, rows in gathered.rows.items()}
    if not streams:
        return Refused(name=name, reason="; ".join(["no topic that can be read", *report.lines()]))
    return LogEpisode(name=name, streams=streams, whole=report.whole, problems=report.lines(), sha256=sha256,
                      facts={**facts, "start_ns": gathered.start, "topics": gathered.topics})


class _Gathered:
    """The parts of all messages, by the stream that they belong to."""

    def __init__(self, decoder: Callable[[Channel], Decode], report: Report) -> None:
        self._decoder = decoder
        self._report = report
        self._decoders: dict[Channel, Decode | UnusableError] = {}
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.rows: dict[str, list[_Row]] = {}
        self.topics: dict[str, dict[str, Any]] = {}
        """Type and number of messages, those that cannot be used included."""
        self.start = 0

    def add(self, file: LogFile, message: RawMessage) -> None:
        """Decode a message and keep what it says; the report hears of one that cannot be used."""
        channel, data = message.channel, message.data
        message = message._replace(data=b"")  # pictures are not kept in memory
        self.start = min(self.start, message.log) if self.topics else message.log
        self.topics.setdefault(channel.topic, {"type": channel.type, "messages": 0})["messages"] += 1
        try:
            decode = self._decode_of(channel)
            for part in parts(channel.type, decode(data)):
                self._keep(_Row(part, message, file))
        except UnusableError as reason:
            self._report.count(channel.topic, f"messages {reason}")
        except Exception as error:  # corrupt bytes raise nearly anything inside decoders
            self._report.count(channel.topic, "messages that cannot be decoded", one_line(error))

    def _decode_of(self, channel: Channel) -> Decode:
        if channel not in self._decoders:
            try:
                self._decoders[channel] = self._decoder(channel)
            except UnusableError as reason:
                self._decoders[channel] = reason
        decode = self._decoders[channel]
        if isinstance(decode, UnusableError):
            raise decode
        return decode

    def _keep(self, row: _Row) -> None:
        channel, part = row.message.channel, row.part
        name = channel.topic + part.suffix
        if not name.isprintable() or ".." in name.split("/"):
            raise UnusableError("of a hostile name")
        rows = self.rows.setdefault(name, [])
        if rows:
            first = rows[0].message.channel
            if (first.topic, first.type, rows[0].part.kind) != (channel.topic, channel.type, part.kind):
                raise UnusableError(f"of type {channel.type}, where others of {first.topic} are {first.type}")
        names = self._names.setdefault(part.names, part.names)  # one copy for all messages
        rows.append(row._replace(part=part._replace(names=names)))


def _stream(name: str, rows: list[_Row], start: int, report: Report) -> Stream:
    """Of numbers or texts."""
    kind, schema = rows[0].part.kind, rows[0].message.channel.type
    if kind is Kind.TEXT:
        return Stream(name=name, kind=kind, clocks=_clocks(name, rows, start, report), schema=schema,
                      texts=tuple(row.part.value for row in rows))
    rows, names = _same_names(name, rows, report)
    return Stream(name=name, kind=kind, clocks=_clocks(name, rows, start, report), names=names, schema=schema,
                  values=np.stack([_in_order(row.part, names) for row in rows]))


def _camera(name: str, rows: list[_Row], start: int, report: Report, pictures: Pictures) -> Stream:
    sizes = {row.part.value for row in rows}
    return Stream(name=name, kind=Kind.IMAGE, clocks=_clocks(name, rows, start, report), pictures=pictures,
                  portable=True, size=sizes.pop() if len(sizes) == 1 else None, schema=rows[0].message.channel.type)


def _same_names(name: str, rows: list[_Row], report: Report) -> tuple[list[_Row], tuple[str, ...]]:
    """The rows with the most common dimensions, in whatever order, and the names of the first of them."""
    seen = Counter((len(row.part.value), row.part.names) for row in rows)
    unordered = {(count, names): (count, tuple(sorted(names)) if len(set(names)) == count else names)
                 for count, names in seen}
    totals: Counter[tuple[int, tuple[str, ...]]] = Counter()
    for dimensions, number in seen.items():
        totals[unordered[dimensions]] += number
    (common, number), = totals.most_common(1)
    kept = [row for row in rows if unordered[len(row.part.value), row.part.names] == common]
    if number < len(rows):
        report.count(name, "messages whose names or number of values are not those of most", number=len(rows) - number)
    return kept, kept[0].part.names


def _in_order(part: Part, names: tuple[str, ...]) -> Float64[np.ndarray, " d"]:
    return part.value if part.names == names else part.value[[part.names.index(name) for name in names]]


def _clocks(name: str, rows: list[_Row], start: int, report: Report) -> dict[str, Float64[np.ndarray, " n"]]:
    """``header`` where every message has a stamp, ``publish`` where it is not the log time."""
    clocks = {}
    stamped = sum(row.part.stamp != 0 for row in rows)
    if stamped == len(rows):
        clocks["header"] = [row.part.stamp for row in rows]
    elif stamped:
        report.note(name, f"{len(rows) - stamped} of {len(rows)} messages have no stamp in their header, so that clock "
                    "is left out")
    clocks["log"] = [row.message.log for row in rows]
    if any(row.message.publish != row.message.log for row in rows):
        clocks["publish"] = [row.message.publish for row in rows]
    return {clock: np.array([(time - start) / 1e9 for time in times]) for clock, times in clocks.items()}


@dataclass(frozen=True, kw_only=True)
class BagPictures:
    """Pictures of a topic, found again by their places."""

    name: str
    """Of the stream."""
    decoder: Callable[[Channel], Decode]
    files: tuple[LogFile, ...]
    seen: tuple[SeenFile, ...]
    """The files as they were when the places were noted."""
    channels: tuple[Channel, ...]
    at: Int64[np.ndarray, "n 4"]
    """Of each message: number of its file, number of its channel, place."""

    @staticmethod
    def of(
        name: str, rows: Sequence[_Row], decoder: Callable[[Channel], Decode], seen: Mapping[Path, SeenFile]
    ) -> BagPictures:
        """Of the rows of a stream."""
        files = {row.file.path: row.file for row in rows}
        channels = list(dict.fromkeys(row.message.channel for row in rows))
        file_of = {file: i for i, file in enumerate(files)}
        channel_of = {channel: i for i, channel in enumerate(channels)}
        at = [(file_of[row.file.path], channel_of[row.message.channel], *row.message.place) for row in rows]
        return BagPictures(name=name, decoder=decoder, files=tuple(files.values()), channels=tuple(channels),
                           seen=tuple(seen[file] for file in files), at=np.array(at, np.int64))

    def __call__(self, numbers: Sequence[int], least: Size | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """See ``Pictures``."""
        found, previous = self._read(list(dict.fromkeys(numbers))), None
        for number in numbers:
            if number != previous:
                try:
                    picture = decode_picture(next(found), least)
                except Exception as error:  # corrupt bytes raise nearly anything inside decoders
                    raise ValueError(f"{self.name}: message {number} cannot be decoded ({one_line(error)})") from error
                previous = number
            yield picture

    def _read(self, numbers: Sequence[int]) -> Iterator[Tree]:
        decode = [self.decoder(channel) for channel in self.channels]
        for file, group in groupby(numbers, lambda number: self.at[number, 0]):
            self.seen[file].check()
            wanted = list(group)
            places = [(int(at), int(offset)) for at, offset in self.at[wanted, 2:]]
            for number, data in zip(wanted, self.files[file].read(places), strict=True):
                yield decode[self.at[number, 1]](data)


def parts(type_name: str, message: Tree) -> list[Part]:
    """What a decoded message says. Raises ``UnusableError``, or nearly anything on a message not of its type."""
    stamp = _stamp(message)
    rule = RULES.get(re.sub(r"^(\w+)/(\w+)$", r"\1/msg/\2", type_name), _numbers)
    return [part if part.stamp else part._replace(stamp=stamp) for part in rule(message)]


def _stamp(message: Tree) -> int:
    """Time of the header (ROS) or of the message (Foxglove) in ns; 0 where it has none."""
    header = message.get("header")
    time = header.get("stamp") if isinstance(header, dict) else message.get("timestamp")
    return (_nanoseconds(time) or 0) if isinstance(time, dict) else 0


def _nanoseconds(tree: Tree) -> int | None:
    """Of a time or a duration; None for any other tree."""
    for seconds, rest in (("sec", "nanosec"), ("sec", "nsec"), ("seconds", "nanos")):
        if tree.keys() == {seconds, rest}:
            time = int(tree[seconds]) * 10**9 + int(tree[rest])
            if abs(time) >= 2**63:  # as JSON may hold
                raise ValueError("a time beyond 64 bits")
            return time
    return None


def _vector(suffix: str, names: Iterable[str], values: Any, stamp: int = 0) -> Part:
    return Part(suffix, Kind.VECTOR, np.array(values, np.float64).reshape(-1), tuple(map(str, names)), stamp)


def _joints(message: Tree, names: str, *fields: str, values: Tree | None = None) -> list[Part]:
    source = message if values is None else values
    found = [_vector(f".{name}", message.get(names, ()), source[name]) for name in fields if len(source.get(name, ()))]
    if not found:
        raise UnusableError("without values")
    return found


def _foxglove_joints(message: Tree) -> list[Part]:
    found = {field: {joint["name"]: joint[field] for joint in message["joints"] if joint.get(field) is not None}
             for field in ("position", "velocity", "acceleration", "effort")}
    if not any(found.values()):
        raise UnusableError("without values")
    return [_vector(f".{field}", values, list(values.values())) for field, values in found.items() if values]


def _trajectory(message: Tree) -> list[Part]:
    if not message["points"]:
        raise UnusableError("without points")
    return _joints(message, "joint_names", *_POINT, values=message["points"][0])


def _array(message: Tree) -> list[Part]:
    """Labels of the layout name the values one by one, or the only dimension of all of them."""
    labels = [dimension["label"] for dimension in message["layout"]["dim"] if dimension["label"]]
    count = len(message["data"])
    if not count:
        raise UnusableError("without values")
    if len(labels) != count:
        labels = [f"{labels[0]}[{i}]" for i in range(count)] if len(labels) == 1 else []
    return [_vector("", labels, message["data"])]


def _pose(suffix: str, position: Tree, rotation: Tree, stamp: int = 0) -> Part:
    return _vector(suffix, POSE, [*(position[k] for k in "xyz"), *(rotation[k] for k in "xyzw")], stamp)


def _transform(message: Tree) -> Part:
    """ROS nests the transform and has a header, Foxglove does neither."""
    pose = message.get("transform", message)
    return _pose(f".{message['child_frame_id']}", pose["translation"], pose["rotation"], _stamp(message))


def _odometry(message: Tree) -> list[Part]:
    pose, twist = message["pose"]["pose"], message["twist"]["twist"]
    return [_pose(".pose", pose["position"], pose["orientation"]),
            *(part._replace(suffix=".twist") for part in _numbers(twist))]


def _imu(message: Tree) -> list[Part]:
    """A covariance that begins with -1 says that there is no such measurement."""
    fields = {"orientation": "xyzw", "angular_velocity": "xyz", "linear_acceleration": "xyz"}
    return [_vector(f".{name}", axes, [message[name][axis] for axis in axes]) for name, axes in fields.items()
            if message[f"{name}_covariance"][0] != -1]


def _joy(message: Tree) -> list[Part]:
    return [_vector(f".{name}", (), message[name]) for name in ("axes", "buttons") if len(message[name])]


def _numbers(message: Tree) -> list[Part]:
    """Any message: all its numbers, or its words where these are all that it says."""
    body = {key: value for key, value in message.items()
            if key not in ("header", "timestamp") or not isinstance(value, dict)}
    only = next(iter(body.values())) if len(body) == 1 else None
    if isinstance(only, str):
        return [Part("", Kind.TEXT, only)]
    names, values = [], []
    for name, value in _flatten("", only if "header" in message and isinstance(only, dict) else body):
        names.append(name)
        values.append(value)
        if len(values) > LARGEST_VECTOR:
            raise UnusableError(f"with more than {LARGEST_VECTOR} numbers")
    if not values:
        raise UnusableError("without numbers")
    return [_vector("", names, values)]


def _flatten(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        yield from _flatten_tree(name, value)
    elif isinstance(value, (list, np.ndarray)):
        for i, item in enumerate(value):
            yield from _flatten(f"{name}[{i}]", item)
    elif isinstance(value, bytes):
        raise UnusableError("with binary data, of a type that has no rule")
    elif value is None:
        yield name, np.nan
    elif not isinstance(value, str):
        yield name, float(value)


def _flatten_tree(name: str, tree: Tree) -> Iterator[tuple[str, float]]:
    prefix = f"{name}." if name else ""
    time = _nanoseconds(tree)
    if time is not None:
        yield name, time / 1e9
        return
    for position, rotation in (("position", "orientation"), ("translation", "rotation")):
        if tree.keys() == {position, rotation} and tree[rotation].keys() == set("xyzw"):
            pose = _pose("", tree[position], tree[rotation])
            yield from zip((prefix + axis for axis in POSE), pose.value.tolist(), strict=True)
            return
    for key, value in tree.items():
        yield from _flatten(prefix + key, value)


def _raw_image(message: Tree) -> list[Part]:
    encoding, height, width = message["encoding"], int(message["height"]), int(message["width"])
    if encoding not in BYTES_PER_PIXEL:
        raise UnusableError(f"with encoding {encoding!r:.40}, known are {', '.join(BYTES_PER_PIXEL)}")
    depth = BYTES_PER_PIXEL[encoding]
    step, available = message["step"], len(_bytes(message["data"]))
    if min(height, width) < 1 or step < width * depth or available < height * step:
        raise UnusableError("with fewer bytes than their size needs")
    if depth == 2 and width % 2:
        raise UnusableError("in YUV 4:2:2 with an odd width")
    return [Part("", Kind.IMAGE, (height, width))]


def _compressed_image(message: Tree) -> list[Part]:
    with _open(message) as picture:
        if picture.mode.startswith(("I", "F")):
            raise UnusableError("with depth, not colour")
        return [Part("", Kind.IMAGE, (picture.height, picture.width))]


def decode_picture(message: Tree, least: Size | None = None) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a message of ``RULES`` that is an image; ``least`` as in ``Pictures``.

    Raises nearly anything on corrupt bytes.
    """
    if "encoding" not in message:
        with _open(message) as picture:
            return rgb(picture, least)
    encoding, height, width = message["encoding"], int(message["height"]), int(message["width"])
    depth = BYTES_PER_PIXEL[encoding]
    rows = np.frombuffer(_bytes(message["data"]), np.uint8)[: height * message["step"]].reshape(height, -1)
    pixels = rows[:, : width * depth].reshape(height, width, depth)
    if depth == 2:
        pixels = pixels if encoding in ("yuyv", "yuv422_yuy2") else pixels[:, :, ::-1]
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "yuyv422").to_ndarray(format="rgb24")
    if depth == 1:
        return pixels.repeat(3, 2)
    return np.array(pixels[:, :, 2::-1] if encoding.startswith("bgr") else pixels[:, :, :3])


def _open(message: Tree) -> Image.Image:
    try:
        return Image.open(io.BytesIO(_bytes(message["data"])), formats=("JPEG", "PNG"))
    except UnidentifiedImageError as error:  # its text holds an address in memory
        raise UnusableError("whose pictures are neither JPEG nor PNG") from error


def _bytes(data: Any) -> Any:
    """A buffer: JSON has bytes in base64."""
    return base64.b64decode(data, validate=True) if isinstance(data, str) else data


_POINT = ("positions", "velocities", "accelerations", "effort")
RULES: dict[str, Callable[[Tree], list[Part]]] = {
    "sensor_msgs/msg/JointState": lambda m: _joints(m, "name", "position", "velocity", "effort"),
    "trajectory_msgs/msg/JointTrajectory": _trajectory,
    "trajectory_msgs/msg/JointTrajectoryPoint": lambda m: _joints(m, "joint_names", *_POINT),
    **{f"std_msgs/msg/{kind}MultiArray": _array for kind in (
        "Float32", "Float64", "Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Byte")},
    "nav_msgs/msg/Odometry": _odometry,
    "geometry_msgs/msg/PoseWithCovarianceStamped": lambda m: _numbers(m["pose"]["pose"]),
    "geometry_msgs/msg/TransformStamped": lambda m: [_transform(m)],
    "tf2_msgs/msg/TFMessage": lambda m: [_transform(transform) for transform in m["transforms"]],
    "tf/msg/tfMessage": lambda m: [_transform(transform) for transform in m["transforms"]],
    "sensor_msgs/msg/Imu": _imu,
    "sensor_msgs/msg/Joy": _joy,
    "sensor_msgs/msg/Image": _raw_image,
    "sensor_msgs/msg/CompressedImage": _compressed_image,
    "foxglove.FrameTransform": lambda m: [_transform(m)],
    "foxglove.FrameTransforms": lambda m: [_transform(transform) for transform in m["transforms"]],
    "foxglove.JointStates": _foxglove_joints,
    "foxglove.PoseInFrame": lambda m: _numbers(m["pose"]),
    "foxglove.RawImage": _raw_image,
    "foxglove.CompressedImage": _compressed_image,
}
"""Types that are more than their numbers, with the names of ROS 2 (``pkg/msg/Name``) also for ROS 1."""
