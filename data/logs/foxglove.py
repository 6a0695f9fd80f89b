"""Foxglove MCAP: JSON messages with a JSON schema or without one, Protobuf messages with their descriptors.

https://mcap.dev/spec/registry
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcap.records import Schema
from mcap_protobuf.decoder import DecoderFactory

from data.lerobot import file_sha256
from data.logs.mcap_salvage import McapFile, first_words
from data.logs.messages import Channel, Decode, Report, Tree, UnusableError, read_episode
from data.logs.streams import LogEpisode, Refused
from data.text import one_line
from data.types import UserError

FORMAT = "Foxglove MCAP"
ROS_ENCODINGS = ("cdr", "ros1")


def sniff(path: Path) -> str | None:
    """``Foxglove MCAP`` for an MCAP file of any profile but those of ROS; never raises."""
    try:
        if not path.is_file():
            return None
        profile, encoding = first_words(path)
    except Exception:  # whatever the bytes are, looking at them raises nothing
        return None
    return None if profile in ("ros1", "ros2") or encoding in ROS_ENCODINGS else FORMAT


def open_log(path: Path) -> FoxgloveLog:
    """Open a file. Raises ``UserError`` when it is no MCAP file."""
    if sniff(path) is None:
        raise UserError(f"{path}: expected a Foxglove MCAP file; check source=<file>")
    return FoxgloveLog(path)


class FoxgloveLog:
    """One MCAP file, which is one episode."""

    format = FORMAT

    def __init__(self, path: Path) -> None:
        """Use ``open_log``."""
        self.path = path

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """The file, as far as it can be read. ``sha256`` is the file's."""
        try:
            yield read_episode(self.path.name, [McapFile(self.path)], decoder, report=Report(), facts={},
                               sha256=file_sha256(self.path))
        except OSError as error:
            yield Refused(name=self.path.name, reason=f"cannot be read ({one_line(error)})")


def decoder(channel: Channel) -> Decode:
    """Of a JSON or Protobuf channel. Raises ``UnusableError`` for any other, or where the schema is no good."""
    if channel.encoding == "json" and channel.schema_encoding in ("", "jsonschema"):
        return _json_decoder(channel)
    if channel.encoding == "protobuf" and channel.schema_encoding == "protobuf":
        return _protobuf_decoder(channel)
    raise UnusableError(f"in {channel.encoding!r:.40} with a schema in {channel.schema_encoding!r:.40}, known are "
                        "cdr, ros1, json and protobuf, each with its schema")


def _json_decoder(channel: Channel) -> Decode:
    try:
        schema = json.loads(channel.definition or "{}")
        fields = schema.get("properties", {})
        binary = [name for name, field in fields.items() if field.get("contentEncoding") == "base64"]
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnusableError("whose JSON schema is damaged") from error

    def decode(data: bytes) -> Tree:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise UnusableError("that are no JSON objects")
        for name in binary:
            if isinstance(message.get(name), str):
                message[name] = base64.b64decode(message[name], validate=True)
        return message

    return decode


def _protobuf_decoder(channel: Channel) -> Decode:
    schema = Schema(id=1, name=channel.type, encoding="protobuf", data=channel.definition)
    try:
        parse = DecoderFactory().decoder_for("protobuf", schema)
    except Exception as error:  # corrupt descriptors raise nearly anything
        raise UnusableError(f"whose Protobuf schema is damaged ({one_line(error)})") from error
    assert parse is not None
    return lambda data: _tree(parse(data))


def _tree(message: Any) -> Tree:
    """Fields of a Protobuf message; those that it leaves out where absence can be told from zero are left out."""
    return {field.name: _value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields
            if not field.has_presence or message.HasField(field.name)}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if field.message_type.GetOptions().map_entry:
        of_messages = field.message_type.fields_by_name["value"].message_type is not None
        return {str(key): _tree(item) if of_messages else item for key, item in sorted(value.items())}
    return [_tree(item) for item in value] if field.is_repeated else _tree(value)
