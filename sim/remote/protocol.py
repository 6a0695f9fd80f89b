"""How we and a simulator in another Python environment talk: small messages over a socket, rows in shared memory.

A message is a JSON object behind its length, and then the arrays that it names, as raw bytes. Nothing is pickled. What
every step moves (actions in; frames, proprio and flags out) lies in one block of memory that both sides map: the
simulator writes its pixels there, and whoever asked copies them once. There are two sides of answers, used in turn, so
that those of the last call are whole whenever the simulator dies in the next.

Only the standard library and NumPy, Python 3.10 or later: the simulator's environment has nothing of ours.
Axes: ``n`` rows, ``a`` action and ``p`` proprio dimensions, ``h w`` pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

VERSION = 2
"""Both sides must speak the same. Raise it when a message or the layout of the block changes."""

_LENGTH = struct.Struct("!II")
"""Bytes of the JSON text, and of all arrays."""
_ALIGNMENT = 64


class BadInputError(Exception):
    """Raised by a simulator for what a user can mend: one line that says what was expected, what came, what to type."""


class GoneError(Exception):
    """The other side has closed the socket, or its process is gone."""


@dataclass(frozen=True)
class Description:
    """What a served simulator says of itself. Units and conventions are those of ``data.types``."""

    cameras: list[str]
    image_size: int
    """Frames are square, in pixels."""
    proprio_names: list[str]
    action_names: list[str]
    control_hz: float
    max_episode_steps: int
    row_tasks: list[str]
    """The task of each row; as many as there are rows."""
    embodiment: str
    statistics: dict[str, list[float]]
    """``action_low``, ``action_high`` ``[a]``, ``proprio_mean``, ``proprio_std`` ``[p]``."""
    provenance: dict[str, Any]
    """What every trajectory recorded here shall carry: the simulator, its versions, what a seed means."""
    factors: list[str] = dataclasses.field(default_factory=list)
    """What of ``sim.perturbation.Perturbation`` it has; one that has some has ``perturb`` (``serve.Changeable``)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Answers:
    """What the rows show, as arrays in shared memory. A simulator writes the rows that it was asked for, in place."""

    frames: dict[str, np.ndarray]
    """By camera: uint8 ``[n, h, w, 3]``."""
    proprio: np.ndarray
    """float32 ``[n, p]``."""
    reward: np.ndarray
    """float32 ``[n]``."""
    terminated: np.ndarray
    """bool ``[n]``; the next three too."""
    truncated: np.ndarray
    success: np.ndarray
    decided: np.ndarray
    """Whether the episode's outcome is known, where rows play on after it."""
    time: np.ndarray
    """float64 ``[n]``: simulated seconds since the reset."""

    def arrays(self) -> list[np.ndarray]:
        """Every array, in one order."""
        rest = (getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "frames")
        return [*self.frames.values(), *rest]


@dataclass(frozen=True)
class Block:
    """The shared memory of one process, as arrays."""

    actions: np.ndarray
    """float32 ``[n, a]``, normalised; from us. The next two too."""
    mask: np.ndarray
    """bool ``[n]``: the rows that a call is about."""
    seeds: np.ndarray
    """int64 ``[n]``."""
    expert: np.ndarray
    """float32 ``[n, a]``: what the scripted expert would do; from the simulator, and so are both ``sides``."""
    sides: tuple[Answers, Answers]


def block_bytes(description: Description) -> int:
    """Size of the shared memory."""
    return _lay_out(description)[1]


def map_block(memory: mmap.mmap, description: Description) -> Block:
    """Arrays over the shared memory, the same on both sides."""
    places, _ = _lay_out(description)

    def view(name: str) -> np.ndarray:
        dtype, shape, offset = places[name]
        return np.ndarray(shape, dtype, memory, offset)

    def side(number: int) -> Answers:
        names = (field.name for field in dataclasses.fields(Answers) if field.name != "frames")
        return Answers(frames={camera: view(f"{number}/frames/{camera}") for camera in description.cameras},
                       **{name: view(f"{number}/{name}") for name in names})

    return Block(actions=view("actions"), mask=view("mask"), seeds=view("seeds"), expert=view("expert"),
                 sides=(side(0), side(1)))


def _lay_out(description: Description) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Type, shape and offset of every array by name, and the size of it all."""
    rows, size = len(description.row_tasks), description.image_size
    action, proprio = (rows, len(description.action_names)), (rows, len(description.proprio_names))
    fields: dict[str, tuple[str, tuple[int, ...]]] = {
        "actions": ("<f4", action), "mask": ("?", (rows,)), "seeds": ("<i8", (rows,)), "expert": ("<f4", action)}
    for number in (0, 1):
        fields |= {f"{number}/frames/{camera}": ("u1", (rows, size, size, 3)) for camera in description.cameras}
        fields |= {f"{number}/proprio": ("<f4", proprio), f"{number}/reward": ("<f4", (rows,)),
                   f"{number}/time": ("<f8", (rows,))}
        fields |= {f"{number}/{flag}": ("?", (rows,)) for flag in ("terminated", "truncated", "success", "decided")}
    places, offset = {}, 0
    for name, (dtype, shape) in fields.items():
        places[name] = (dtype, shape, offset)
        offset += -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    return places, offset


def send(connection: socket.socket, message: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Send a JSON object, and numeric arrays by name.

    Raises:
        GoneError: nobody is there to read it.
    """
    named = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    about = [[name, array.dtype.str, list(array.shape)] for name, array in named.items()]
    text = json.dumps({**message, "arrays": about}).encode()
    content = b"".join(array.tobytes() for array in named.values())
    try:
        connection.sendall(_LENGTH.pack(len(text), len(content)) + text + content)
    except OSError as error:
        raise GoneError from error


def receive(connection: socket.socket, seconds: float | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Wait for a message, at most ``seconds``.

    Raises:
        GoneError: the other side has closed.
        TimeoutError: it did not send a whole message in time.
    """
    until = None if seconds is None else time.monotonic() + seconds
    lengths = _LENGTH.unpack(_read(connection, _LENGTH.size, until))
    message = json.loads(_read(connection, lengths[0], until))
    content, offset, arrays = _read(connection, lengths[1], until), 0, {}
    for name, dtype, shape in message.pop("arrays"):
        count = math.prod(shape)
        arrays[name] = np.frombuffer(content, dtype, count, offset).reshape(shape)
        offset += count * np.dtype(dtype).itemsize
    return message, arrays


def _read(connection: socket.socket, size: int, until: float | None) -> bytearray:
    content, filled = bytearray(size), 0
    try:
        while filled < size:
            connection.settimeout(None if until is None else max(1e-3, until - time.monotonic()))
            count = connection.recv_into(memoryview(content)[filled:])
            if count == 0:
                raise GoneError
            filled += count
    except TimeoutError:
        raise
    except OSError as error:
        raise GoneError from error
    finally:
        connection.settimeout(None)
    return content
