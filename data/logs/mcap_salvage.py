"""MCAP files record by record, closed or not: a cut file gives every message up to its last whole chunk.

Standard readers go through the summary at the file's end and return nothing without it. Format: https://mcap.dev/spec
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase, BufferedReader, BytesIO
from pathlib import Path

import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import EndOfFile, McapError
from mcap.opcode import Opcode
from mcap.records import Channel as ChannelRecord
from mcap.records import Chunk, Footer, Header, Message, Schema, Statistics
from mcap.stream_reader import get_chunk_data_stream

from data.logs.messages import Channel, DamagedError, Place, RawMessage, Report
from data.text import one_line

MAGIC = b"\x89MCAP0\r\n"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_TOP = -1
"""In a ``Place``: outside of every chunk."""
_FOOTER_HEAD = struct.pack("<BQ", Opcode.FOOTER, 20)
_DAMAGE = (McapError, struct.error, ValueError)
"""What reading a record raises whose bytes are wrong."""


class McapFile:
    """One MCAP file, possibly compressed as a whole."""

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self.path = path
        self.name = path.name

    def messages(self, report: Report) -> Iterator[RawMessage]:
        """Every message that can be reached, in the order of the file; ``report`` hears what was lost.

        Raises ``DamagedError`` when this is no MCAP file at all.
        """
        with uncompressed(self.path) as file:
            end = _check_magic(file)
            channels = _Channels()
            footer = _footer(file, end)
            if footer is None:
                report.note(self.name, "no footer, so the recording was cut; salvaged to its last whole chunk",
                            lost=True)
            else:
                end -= len(MAGIC)
                if footer.summary_start:
                    channels.take_summary(file, footer.summary_start, end)
            count = 0
            try:
                for message in self._messages(file, len(MAGIC), end, channels, report):
                    count += 1
                    yield message
            except EndOfFile:
                if footer is not None:
                    report.note(self.name, "a damaged record; what follows it was lost", lost=True)
            if channels.expected is not None and count != channels.expected:
                report.note(self.name, f"{count} messages found, its summary counts {channels.expected}",
                            lost=count < channels.expected)

    def read(self, places: Iterable[Place]) -> Iterator[bytes]:
        """The messages at these places again. Raises nearly anything when the file has changed."""
        with uncompressed(self.path) as file:
            chunk_at, chunk = _TOP, BytesIO()
            for at, offset in places:
                if at not in (_TOP, chunk_at):
                    chunk_at, chunk = at, BytesIO(_chunk(_next(file, at)))
                yield _message(_next(file if at == _TOP else chunk, offset)).data

    def _messages(
        self, file: BufferedIOBase, start: int, end: int, channels: _Channels, report: Report, chunk_at: int = _TOP
    ) -> Iterator[RawMessage]:
        """Of the file, or of one chunk's content. Raises ``EndOfFile`` where a record is not whole."""
        for opcode, at in _records(file, start, end):
            if opcode == Opcode.CHUNK and chunk_at == _TOP:
                yield from self._in_chunk(_next(file, at), at, channels, report)
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE):
                body = _next(file, at)
                try:
                    channels.take(opcode, body)
                    message = _message(body) if opcode == Opcode.MESSAGE else None
                except _DAMAGE as error:
                    report.count(self.name, "damaged records", one_line(error), lost=True)
                    continue
                if message is None:
                    continue
                if message.channel_id in channels.by_id:
                    yield RawMessage(channels.by_id[message.channel_id], message.log_time, message.publish_time,
                                     message.data, (chunk_at, at))
                else:
                    report.count(self.name, "messages of a channel that the file does not describe", lost=True)

    def _in_chunk(self, body: bytes, at: int, channels: _Channels, report: Report) -> Iterator[RawMessage]:
        try:
            content = _chunk(body)
        except DamagedError as reason:
            report.count(self.name, "damaged chunks, skipped", str(reason), lost=True)
            return
        try:
            yield from self._messages(BytesIO(content), 0, len(content), channels, report, at)
        except EndOfFile:
            report.count(self.name, "damaged chunks, read up to the damage", lost=True)


def first_words(path: Path) -> tuple[str, str | None]:
    """Profile of an MCAP file, and the encoding of its first channel; None where no channel can be reached.

    Raises ``DamagedError`` or ``OSError`` when this is no MCAP file.
    """
    profile, channels = "", _Channels()
    with path.open("rb") as file:
        end = _check_magic(file)
        with suppress(DamagedError, *_DAMAGE):
            for opcode, at in _records(file, len(MAGIC), end):
                if opcode == Opcode.HEADER:
                    profile = Header.read(_stream(_next(file, at))).profile
                elif opcode == Opcode.CHUNK:
                    content = BytesIO(_chunk(_next(file, at)))
                    for inner, inner_at in _records(content, 0, len(content.getvalue())):
                        channels.take(inner, _next(content, inner_at))
                elif opcode == Opcode.CHANNEL:
                    channels.take(opcode, _next(file, at))
                if profile or channels.by_id:
                    break
    first = next(iter(channels.by_id.values()), None)
    return profile, first.encoding if first else None


@contextmanager
def uncompressed(path: Path) -> Iterator[BufferedReader]:
    """The file, opened to read; one that is zstd as a whole by way of a temporary file, up to where it was cut."""
    with path.open("rb") as file:
        compressed = file.read(len(ZSTD_MAGIC)) == ZSTD_MAGIC
        file.seek(0)
        if not compressed:
            yield file
            return
        with tempfile.NamedTemporaryFile() as plain:
            with suppress(zstandard.ZstdError):
                shutil.copyfileobj(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True), plain)
            plain.flush()
            with open(plain.name, "rb") as again:
                yield again


class _Channels:
    """What the file has said so far of its schemas and channels."""

    def __init__(self) -> None:
        self._schemas: dict[int, Schema] = {}
        self.by_id: dict[int, Channel] = {}
        self.expected: int | None = None
        """Messages that the summary counts."""

    def take_summary(self, file: BufferedIOBase, start: int, end: int) -> None:
        """It repeats the schemas and channels, which the first chunks hide when they are damaged."""
        with suppress(*_DAMAGE):
            for opcode, at in _records(file, start, end):
                if opcode == Opcode.STATISTICS:
                    self.expected = Statistics.read(_stream(_next(file, at))).message_count
                self.take(opcode, _next(file, at))

    def take(self, opcode: int, body: bytes) -> None:
        """Note a schema or a channel; other records are ignored."""
        if opcode == Opcode.SCHEMA:
            schema = Schema.read(_stream(body))
            self._schemas.setdefault(schema.id, schema)
        elif opcode == Opcode.CHANNEL:
            record = ChannelRecord.read(_stream(body))
            known = self._schemas.get(record.schema_id, Schema(id=0, data=b"", encoding="", name=""))
            channel = Channel(topic=record.topic, type=known.name, encoding=record.message_encoding,
                              schema_encoding=known.encoding, definition=known.data)
            self.by_id.setdefault(record.id, channel)


def _records(file: BufferedIOBase, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Opcode and place of each record. Raises ``EndOfFile`` at one that is not whole."""
    at = start
    while at < end:
        file.seek(at)
        head = file.read(9)
        if len(head) < 9:
            raise EndOfFile
        opcode, length = struct.unpack("<BQ", head)
        if at + 9 + length > end:
            raise EndOfFile
        yield opcode, at
        at += 9 + length


def _next(file: BufferedIOBase, at: int) -> bytes:
    """Body of the record at this place."""
    file.seek(at + 1)
    (length,) = struct.unpack("<Q", file.read(8))
    return file.read(length)


def _check_magic(file: BufferedIOBase) -> int:
    """Size of the file. Raises ``DamagedError`` when it is none of MCAP."""
    end = file.seek(0, 2)
    file.seek(0)
    if file.read(len(MAGIC)) != MAGIC:
        raise DamagedError("empty or no MCAP file")
    return end


def _footer(file: BufferedIOBase, end: int) -> Footer | None:
    """The record that only a closed file ends with."""
    file.seek(max(end - len(_FOOTER_HEAD) - 20 - len(MAGIC), 0))
    tail = file.read()
    if not (tail.startswith(_FOOTER_HEAD) and tail.endswith(MAGIC)):
        return None
    return Footer.read(_stream(tail[len(_FOOTER_HEAD):]))


def _chunk(body: bytes) -> bytes:
    """The records in a chunk. Raises ``DamagedError`` when they cannot be unpacked or their CRC is wrong."""
    try:
        chunk = Chunk.read(_stream(body))
        if chunk.compression not in ("", "lz4", "zstd"):
            raise DamagedError(f"compression {chunk.compression!r} is unknown")
        stream, size = get_chunk_data_stream(chunk, validate_crc=True)  # a CRC of 0 says that there is none
        content = stream.read(size)
    except DamagedError:
        raise
    except Exception as error:  # corrupt bytes raise nearly anything inside decompressors
        raise DamagedError(one_line(error)) from error
    if size != chunk.uncompressed_size:
        raise DamagedError(f"{size} bytes where {chunk.uncompressed_size} were said")
    return content


def _message(body: bytes) -> Message:
    return Message.read(_stream(body), len(body))


def _stream(body: bytes) -> ReadDataStream:
    return ReadDataStream(BytesIO(body))
