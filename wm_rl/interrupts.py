"""Requests to stop that cannot get lost: Ctrl-C, SIGTERM, and SIGUSR1, by which Slurm warns before a job's time is up.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be, and code that catches too much swallows it.
So it is also remembered, and asked for at safe places; where it would do harm it is only remembered.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_seen: int | None = None
"""The first signal that came."""
_deferring = False


def remember() -> None:
    """From now on, ``check`` knows of every request to stop. Call it in the main thread."""
    global _seen
    _seen = None
    listen()


def listen() -> None:
    """Take the signals, or take them back from a library that took them."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def seen() -> bool:
    """Whether a request came since ``remember``."""
    return _seen is not None


def check() -> None:
    """Raise ``KeyboardInterrupt`` if one came since ``remember``."""
    if seen():
        raise KeyboardInterrupt


def exit_status() -> int:
    """What a shell expects of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + (_seen or signal.SIGINT)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Inside, a request is only remembered, so ask ``seen``. A second Ctrl-C is raised all the same."""
    global _deferring
    before, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = before


@contextlib.contextmanager
def immediate() -> Iterator[None]:
    """Within ``deferred``: here a request is raised at once after all, also one that came before."""
    global _deferring
    before, _deferring = _deferring, False
    try:
        check()
        yield
    finally:
        _deferring = before


def _handle(number: int, frame: FrameType | None) -> None:
    global _seen
    impatient = number == signal.SIGINT and _seen == signal.SIGINT
    _seen = number if _seen is None else _seen
    if impatient or not _deferring:
        raise KeyboardInterrupt
