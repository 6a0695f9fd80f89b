"""ROS 2 bags (a folder with ``metadata.yaml``, an ``.mcap``, a ``.db3``) and ROS 1 ``.bag`` files, without ROS.

A bag is one episode. Metadata are compared with the files and not trusted. Messages are decoded by the definitions in
the bag; where it has none, by those of ROS 2 Humble, the last whose bags left them out. Formats:
https://github.com/ros2/rosbag2 and https://wiki.ros.org/Bags/Format/2.0
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, cast

import yaml
import zstandard
from rosbags.rosbag1 import ReaderError
from rosbags.rosbag1.reader import Header, RecordType, decompressors, read_uint32
from rosbags.typesys import Stores, get_types_from_idl, get_types_from_msg, get_typestore
from rosbags.typesys.msg import normalize_msgtype
from rosbags.typesys.store import Typestore

from data.lerobot import file_sha256
from data.logs import foxglove
from data.logs.mcap_salvage import MAGIC, ZSTD_MAGIC, McapFile, first_words, uncompressed
from data.logs.messages import (
    Channel,
    DamagedError,
    Decode,
    LogFile,
    Place,
    RawMessage,
    Report,
    UnusableError,
    read_episode,
)
from data.logs.streams import LogEpisode, Refused
from data.text import one_line
from data.types import UserError

METADATA, INFORMATION = "metadata.yaml", "rosbag2_bagfile_information"
SQLITE_MAGIC, ROS1_MAGIC, ROS1_VERSION = b"SQLite format 3\0", b"#ROSBAG V", b"2.0\n"
MCAP, SQLITE, ROS1 = "rosbag2 (mcap)", "rosbag2 (sqlite3)", "ROS 1 bag"
_FILE = re.compile(r"(?P<bag>.+?)(_(?P<number>\d+))?\.(mcap|db3)(\.zstd?)?")
_OUTSIDE = re.compile(r"[/\\]|[A-Za-z]:|(.*[/\\])?\.\.([/\\].*)?$")
_SQLITE_ERRORS = (sqlite3.Error, UnicodeError)
"""The second, where the text of the first would quote bytes that are no text."""
_TOP = -1
"""In a ``Place`` of a ROS 1 bag: outside of every chunk."""


def sniff(path: Path) -> str | None:
    """Format of a bag: a file by its content, a folder when it has ``metadata.yaml`` or is plainly one bag."""
    try:
        return _folder_format(path) if path.is_dir() else _file_format(path)
    except Exception:  # whatever the bytes are, looking at them raises nothing
        return None


def open_log(path: Path) -> BagLog:
    """Open a bag. Raises ``UserError`` when there is none."""
    found = sniff(path)
    if found is None:
        raise UserError(f"{path}: expected a ROS 2 bag (a folder with {METADATA}, an .mcap or .db3 file) or a ROS 1 "
                        ".bag; check source=<bag>")
    return BagLog(path, found)


class BagLog:
    """One bag, which is one episode."""

    def __init__(self, path: Path, found: str) -> None:
        """Use ``open_log``."""
        self.path = path
        self.format = found

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """The bag, as far as it can be read.

        ``sha256`` is that of the file, or of the lines ``<file> <its sha256>`` of the files of a folder.
        """
        name = self.path.absolute().name
        try:
            if self.path.is_dir():
                yield _read_folder(self.path, name)
            else:
                yield read_episode(name, [_log_file(self.path)], decoder, report=Report(), facts={},
                                   sha256=file_sha256(self.path))
        except OSError as error:
            yield Refused(name=name, reason=f"cannot be read ({one_line(error)})")


def _file_format(path: Path) -> str | None:
    head = _head(path)
    if head.startswith(ROS1_MAGIC):
        return ROS1
    if head.startswith(MAGIC):
        with path.open("rb") as file:
            if file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC:  # as rosbag2 does, and nobody else
                return MCAP
        profile, encoding = first_words(path)
        return MCAP if profile in ("ros1", "ros2") or encoding in foxglove.ROS_ENCODINGS else None
    return SQLITE if head.startswith(SQLITE_MAGIC) and _may_be_bag(path) else None


def _folder_format(folder: Path) -> str | None:
    files = _storage_files(folder)
    found = next((kind for kind in map(sniff, files) if kind), None)
    metadata = folder / METADATA
    if metadata.is_file() and INFORMATION.encode() in metadata.read_bytes():
        return found or "rosbag2"
    alone = len(files) == 1 and list(folder.iterdir()) == files
    splits = all(_split(file)[0] == folder.name for file in files)
    return found if metadata.is_file() or alone or splits else None


def _head(path: Path) -> bytes:
    """The first bytes, unpacked where the file is zstd as a whole."""
    with path.open("rb") as file:
        head = file.read(16)
        if head.startswith(ZSTD_MAGIC):
            file.seek(0)
            head = zstandard.ZstdDecompressor().stream_reader(file).read(16)
    return head


def _log_file(path: Path) -> LogFile:
    """By content; where that says nothing, by name, so that reading it says what is wrong."""
    head = b""
    with suppress(zstandard.ZstdError):
        head = _head(path)
    if head.startswith(ROS1_MAGIC):
        return Ros1File(path)
    if head.startswith(SQLITE_MAGIC) or (".db3" in path.suffixes and not head.startswith(MAGIC)):
        return SqliteFile(path)
    return McapFile(path)


def _storage_files(folder: Path) -> list[Path]:
    """In the order of recording."""
    return sorted((file for file in folder.iterdir() if _FILE.fullmatch(file.name) and file.is_file()), key=_split)


def _split(file: Path) -> tuple[str, int]:
    """Name of the bag, and which of its files this is."""
    match = _FILE.fullmatch(file.name)
    return (match["bag"], int(match["number"] or -1)) if match else (file.name, -1)


def _read_folder(folder: Path, name: str) -> LogEpisode | Refused:
    report = Report()
    information = _read_metadata(folder, report)
    named = [path for path in _list(information.get("relative_file_paths")) if isinstance(path, str)]
    outside = [path for path in named if _OUTSIDE.match(path)]
    if outside:
        return Refused(name=name, reason=f"{METADATA} names {outside[0]!r:.80}, which is not in the folder")
    files = _files(folder, named, report)
    metadata = [folder / METADATA] if (folder / METADATA).is_file() else []
    hashes = "".join(f"{file.name} {file_sha256(file)}\n" for file in [*metadata, *files])
    distro = information.get("ros_distro")
    episode = read_episode(name, [_log_file(file) for file in files], decoder, report=report,
                           facts={"ros_distro": distro} if isinstance(distro, str) else {},
                           sha256=hashlib.sha256(hashes.encode()).hexdigest())
    if isinstance(episode, LogEpisode):
        _compare_counts(information, {topic: facts["messages"] for topic, facts in episode.facts["topics"].items()},
                        report)
        episode.whole, episode.problems = report.whole, report.lines()
    return episode


def _read_metadata(folder: Path, report: Report) -> dict[str, Any]:
    try:
        information = yaml.safe_load((folder / METADATA).read_bytes())[INFORMATION]
        if isinstance(information, dict):
            return information
        report.note(METADATA, "damaged; the files were read without it")
    except FileNotFoundError:
        report.note(METADATA, "missing; the files were read without it")
    except Exception as error:  # corrupt YAML raises nearly anything
        report.note(METADATA, f"damaged ({one_line(error)}); the files were read without it")
    return {}


def _files(folder: Path, named: list[str], report: Report) -> list[Path]:
    """Those that the metadata name; where one of them is missing, all that there are."""
    there = _storage_files(folder)
    # Before version 4 of the metadata, paths began with the folder's name.
    found = [file for path in named for file in (folder / path, folder / Path(path).name) if file.is_file()]
    found = list(dict.fromkeys(found))
    more = [file for file in there if file not in found]
    if len(found) < len(named):
        report.note(METADATA, f"names {len(named)} files, {len(named) - len(found)} of them missing",
                    lost=len(found) + len(more) < len(named))
        return sorted([*found, *more], key=_split)
    if named and more:
        report.note(METADATA, f"does not name {', '.join(file.name for file in more)}, not read")
    return found if named else there


def _compare_counts(information: dict[str, Any], counts: dict[str, int], report: Report) -> None:
    total, found = information.get("message_count"), sum(counts.values())
    if isinstance(total, int) and total != found:
        report.note(METADATA, f"counts {total} messages, the files hold {found}", lost=found < total)
    for entry in _list(information.get("topics_with_message_count")):
        with suppress(KeyError, TypeError):
            topic, count = entry["topic_metadata"]["name"], entry["message_count"]
            if isinstance(topic, str) and isinstance(count, int) and count != counts.get(topic, 0):
                report.note(METADATA, f"counts {count} messages of {topic}, the files hold {counts.get(topic, 0)}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class SqliteFile:
    """One ``.db3`` file of a ROS 2 bag, possibly compressed as a whole. Nothing is written beside it."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.name = path.name

    def messages(self, report: Report) -> Iterator[RawMessage]:
        """All messages, in the order of recording. Raises ``DamagedError`` when sqlite cannot read everything."""
        journal = self.path.with_name(f"{self.name}-wal")
        if journal.is_file() and journal.stat().st_size:
            report.note(self.name, f"{journal.name} holds messages that were not read; open the bag once with sqlite3",
                        lost=True)
        try:
            with _database(self.path) as database:
                ((verdict,),) = database.execute("PRAGMA quick_check(1)").fetchall()
                if verdict != "ok":
                    raise DamagedError(f"damaged or cut sqlite3 file ({' '.join(str(verdict).split())[:120]})")
                channels = _channels(database)
                for number, topic, time, data in database.execute(
                        "SELECT id, topic_id, timestamp, data FROM messages ORDER BY id"):
                    if topic in channels and isinstance(time, int) and isinstance(data, bytes):
                        yield RawMessage(channels[topic], time, time, data, (number, 0))
                    else:
                        report.count(self.name, "damaged rows", lost=True)
        except _SQLITE_ERRORS as error:
            raise DamagedError(f"damaged or cut sqlite3 file ({one_line(error)})") from error

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The messages with these row numbers again. Raises nearly anything when the file has changed."""
        with _database(self.path) as database:
            for number, _ in places:
                (data,) = database.execute("SELECT data FROM messages WHERE id = ?", (number,)).fetchone()
                yield data


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    with uncompressed(path) as file:
        address = f"{Path(file.name).absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            yield database


def _tables(database: sqlite3.Connection) -> set[str]:
    return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _may_be_bag(path: Path) -> bool:
    """A database that has what a bag has, or a ``.db3`` that is too damaged to tell."""
    try:
        with _database(path) as database:
            return {"topics", "messages"} <= _tables(database)
    except _SQLITE_ERRORS:
        return ".db3" in path.suffixes


def _channels(database: sqlite3.Connection) -> dict[int, Channel]:
    definitions = {}
    if "message_definitions" in _tables(database):
        definitions = {name: (encoding, text) for name, encoding, text in database.execute(
            "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions")}
    topics = database.execute("SELECT id, name, type, serialization_format FROM topics")
    return {number: Channel(topic=str(name), type=str(type_name), encoding=str(encoding),
                            schema_encoding=str(definitions.get(type_name, ("", ""))[0]),
                            definition=str(definitions.get(type_name, ("", ""))[1]).encode())
            for number, name, type_name, encoding in topics}


class Ros1File:
    """One ROS 1 bag, closed or not. Library readers need the index, which a recorder that died has not written."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.name = path.name
        self._channels: dict[int, Channel] = {}

    def messages(self, report: Report) -> Iterator[RawMessage]:
        """Every message that can be reached, in the order of the file. Raises ``DamagedError`` when it is no bag."""
        with uncompressed(self.path) as file:
            end = file.seek(0, 2)
            file.seek(0)
            magic = file.readline(len(ROS1_MAGIC + ROS1_VERSION))
            if magic != ROS1_MAGIC + ROS1_VERSION:
                raise DamagedError(f"expected a ROS 1 bag of version 2.0, found {magic!r}")
            expected = self._read_index(file, end, report)
            count = 0
            try:
                for message in self._messages(file, len(magic), end, report):
                    count += 1
                    yield message
            except (ReaderError, ValueError):
                if expected is not None:
                    report.note(self.name, "a damaged record; what follows it was lost", lost=True)
            if expected is not None and count != expected:
                report.note(self.name, f"{count} messages found, its index counts {expected}", lost=count < expected)

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The messages at these places again. Raises nearly anything when the file has changed."""
        with uncompressed(self.path) as file:
            chunk_at, chunk = _TOP, BytesIO()
            for at, offset in places:
                if at not in (_TOP, chunk_at):
                    chunk_at, chunk = at, BytesIO(_ros1_chunk(*_ros1_record(file, at)))
                yield _ros1_record(file if at == _TOP else chunk, offset)[1]

    def _read_index(self, file: BufferedIOBase, end: int, report: Report) -> int | None:
        """Note the connections, which damaged chunks may hide. Number of messages; None where there is no index."""
        try:
            header = _header(file)
            if header.get("encryptor"):
                raise DamagedError("the bag is encrypted")
            count, index, chunks = 0, header.get_uint64("index_pos"), header.get_uint32("chunk_count")
            if not 0 < index <= end:
                raise ReaderError("no index")
            for at, head in _ros1_records(file, index, end):
                if head.get_uint8("op") == RecordType.CONNECTION:
                    self._note_connection(file, at)
                elif head.get_uint8("op") == RecordType.CHUNK_INFO:
                    count += sum(number for _, number in struct.iter_unpack("<II", _ros1_record(file, at)[1]))
                    chunks -= 1
            if chunks > 0:
                raise ReaderError("chunks without index")
        except (ReaderError, ValueError, struct.error):
            report.note(self.name, "no whole index, so the recording was cut; salvaged to its last whole chunk",
                        lost=True)
            return None
        return count

    def _note_connection(self, file: BufferedIOBase, at: int) -> None:
        file.seek(at)
        head = _header(file)
        body = _header(file)  # a connection's body is made like a header
        self._channels.setdefault(head.get_uint32("conn"), Channel(
            topic=head.get_string("topic"), type=body.get_string("type"), encoding="ros1", schema_encoding="ros1msg",
            definition=body.get("message_definition", b"")))

    def _messages(
        self, file: BufferedIOBase, start: int, end: int, report: Report, chunk_at: int = _TOP
    ) -> Iterator[RawMessage]:
        """Of the file, or of one chunk's content. Raises ``ReaderError`` where a record is not whole.

        In a bag that was not closed, the messages of its last chunk lie outside of it.
        """
        for at, header in _ros1_records(file, start, end):
            kind = header.get_uint8("op")
            if kind == RecordType.CHUNK and chunk_at == _TOP:
                try:
                    content = _ros1_chunk(*_ros1_record(file, at))
                    yield from self._messages(BytesIO(content), 0, len(content), report, at)
                except (DamagedError, ReaderError, ValueError) as reason:
                    report.count(self.name, "damaged chunks", one_line(reason), lost=True)
            elif kind == RecordType.CONNECTION:
                self._note_connection(file, at)
            elif kind == RecordType.MSGDATA:
                channel, time = self._channels.get(header.get_uint32("conn")), header.get_time("time")
                if channel is None:
                    report.count(self.name, "messages of a connection that the bag does not describe", lost=True)
                else:
                    yield RawMessage(channel, time, time, _ros1_record(file, at)[1], (chunk_at, at))


def _ros1_records(file: BufferedIOBase, start: int, end: int) -> Iterator[tuple[int, Header]]:
    """Place and header of each record. Raises ``ReaderError`` or ``ValueError`` at one that is not whole."""
    at = start
    while at < end:
        file.seek(at)
        header = _header(file)
        after = _size(file) + file.tell()
        if after > end:
            raise ReaderError("a record that is not whole")
        yield at, header
        at = after


def _ros1_record(file: BufferedIOBase, at: int) -> tuple[Header, bytes]:
    """Header and body of the record at this place."""
    file.seek(at)
    header = _header(file)
    return header, file.read(_size(file))


def _header(file: BufferedIOBase) -> Header:
    return Header.read(cast(BinaryIO, file))


def _size(file: BufferedIOBase) -> int:
    return read_uint32(cast(BinaryIO, file))


def _ros1_chunk(header: Header, body: bytes) -> bytes:
    """The records in a chunk. Raises ``DamagedError`` when they cannot be unpacked."""
    try:
        content = decompressors[header.get_string("compression")](body)
    except Exception as error:  # corrupt bytes raise nearly anything inside decompressors
        raise DamagedError(one_line(error)) from error
    if len(content) != header.get_uint32("size"):
        raise DamagedError(f"{len(content)} bytes where {header.get_uint32('size')} were said")
    return content


def decoder(channel: Channel) -> Decode:
    """Of a channel in CDR or ROS 1 serialisation, or of a Foxglove one. Raises ``UnusableError`` for any other."""
    if channel.encoding not in foxglove.ROS_ENCODINGS:
        return foxglove.decoder(channel)
    if not channel.type:
        raise UnusableError("without a schema")
    name = normalize_msgtype(channel.type)
    try:
        store = _typestore(channel.encoding, channel.schema_encoding, channel.definition, name)
    except Exception as error:  # corrupt definitions raise nearly anything
        raise UnusableError(f"of type {channel.type}, whose definition is missing or damaged") from error
    deserialize: Callable[[bytes | memoryview, str], Any] = (
        store.deserialize_ros1 if channel.encoding == "ros1" else store.deserialize_cdr)

    def decode(data: bytes) -> dict[str, Any]:
        if channel.encoding == "cdr" and data.startswith(ZSTD_MAGIC):  # no beginning of CDR; each message compressed
            data = _unpack(data)
        return _tree(store, deserialize(memoryview(data), name))

    return decode


@lru_cache(maxsize=256)  # a set of bags has the same types throughout
def _typestore(encoding: str, schema_encoding: str, definition: bytes, name: str) -> Typestore:
    """A store that can decode messages of this type. Raises nearly anything when the definition is damaged."""
    text = definition.decode()
    if re.search(r"\[\s*\d{5,}\s*\]", text):  # the library writes a line of code for each element of an array
        raise ValueError("arrays of a fixed number of elements beyond 9999")
    store = get_typestore(Stores.EMPTY)
    if not text:
        store = get_typestore(Stores.ROS1_NOETIC if encoding == "ros1" else Stores.ROS2_HUMBLE)
    elif schema_encoding == "ros2idl":
        for part in re.split(r"^=+\n", text, flags=re.MULTILINE):
            if part.strip():
                # Includes are other parts; the library's grammar has none.
                store.register(get_types_from_idl(re.sub(r"^(IDL: |#).*\n", "", part, flags=re.MULTILINE)))
    else:
        store.register(get_types_from_msg(text, name))
    store.get_msgdef(name)
    return store


def _tree(store: Typestore, value: Any) -> Any:
    if isinstance(value, list):
        return [_tree(store, item) for item in value]
    if not hasattr(value, "__msgtype__"):
        return value
    return {field: _tree(store, getattr(value, field)) for field, _ in store.get_msgdef(value.__msgtype__).fields
            if field != "structure_needs_at_least_one_member"}


def _unpack(data: bytes) -> bytes:
    unpacking = zstandard.ZstdDecompressor().decompressobj()
    content = unpacking.decompress(data)
    if not unpacking.eof:
        raise ValueError("its compressed bytes are cut")
    return content
