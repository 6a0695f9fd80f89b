"""What every log reader yields: episodes of time-stamped streams, as recorded, with nothing resampled or renamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64, UInt8

from data.types import Success

Size = tuple[int, int]
"""Height and width in pixels."""


class Pictures(Protocol):
    """Pictures of a stream, decoded when asked for."""

    def __call__(self, numbers: Sequence[int], least: Size | None = None) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decode the messages with these numbers, which never decrease and may repeat, one RGB picture at a time.

        With ``least`` they may come smaller by a power of 2 that divides both sides, where that is cheaper, but no side
        below it: what is going to be made smaller anyway need not be decoded whole.

        Raises ``ValueError``, naming the stream and the message, for one that cannot be decoded.
        """
        ...


class Kind(StrEnum):
    """What a stream's messages are."""

    VECTOR = "vector"
    IMAGE = "image"
    TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """``n`` messages of one topic, column or data set of one episode, in the order of the file."""

    name: str
    """As the log names it: a topic with a field (``/joint_states.position``), a column, a path in an HDF5 group."""
    kind: Kind
    clocks: Mapping[str, Float64[np.ndarray, " n"]]
    """Seconds of each message on every clock that the log has, as recorded: not necessarily increasing.

    ``header``: the sensor's stamp. ``log``: when the recorder got it. ``nominal``: number over a declared rate.
    ``index``: message numbers, where the log holds no time at all (1 per message).
    """
    values: Float64[np.ndarray, "n d"] | None = None
    """Of a vector. NaN and infinities are kept."""
    names: tuple[str, ...] = ()
    """Of the ``d`` dimensions; empty where the log has none. As many as it has, even if these are not ``d``."""
    texts: tuple[str, ...] = ()
    """Of a text."""
    pictures: Pictures | None = None
    """Of an image."""
    portable: bool = False
    """``pictures`` can be pickled, takes a few bytes for each message, and reads the file at its first call: whoever
    has it needs not read the episode again."""
    size: Size | None = None
    """Of an image, where known without decoding."""
    schema: str = ""
    """Type of the messages, or dtype and shape of a row."""

    def __len__(self) -> int:
        """Number of messages ``n``."""
        return len(next(iter(self.clocks.values())))


@dataclass(kw_only=True)
class LogEpisode:
    """One episode of a log; whole files are one episode until a mapping cuts them."""

    name: str
    """Unique in its log: ``demo_3``, ``episode 12``, ``run.mcap``. No absolute path."""
    streams: Mapping[str, Stream]
    instruction: str = ""
    task: str = ""
    success: Success = Success.UNKNOWN
    success_from: str = "the log has no success label"
    """What says so."""
    marks: str = ""
    """The stream that is 1 in the rows in which the task is done, where the log marks the rows of a success."""
    whole: bool = True
    """False: the recording was cut, and was salvaged up to there."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON-able provenance. No paths, no user names."""
    problems: tuple[str, ...] = ()
    """What was skipped and why, with counts: ``/tf: 12 messages of an unknown schema``."""
    sha256: str = ""
    """Of the bytes that it was read from."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A file or an episode that cannot be used."""

    name: str
    reason: str
    """For people: what was expected and what was found. One line, no traceback."""


class Log(Protocol):
    """An opened log: a file, or a folder of files of one set."""

    format: str
    """For people: ``rosbag2 (mcap)``, ``robomimic HDF5``."""
    path: Path

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """Every episode in a fixed order. Damage is a ``Refused``, never an exception. Pictures decode on demand."""
        ...


class Reader(Protocol):
    """A module that reads a family of formats."""

    def sniff(self, path: Path) -> str | None:
        """The format's name when the content of this file or folder is of this family; never raises."""
        ...

    def open_log(self, path: Path) -> Log:
        """Open it. Raises ``UserError`` with one line when there is nothing to read in it."""
        ...
