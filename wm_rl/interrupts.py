"""Ctrl-C that cannot get lost.

Python raises ``KeyboardInterrupt`` wherever the main thread happens to be, and code that catches too much
swallows it. So it is also remembered, and asked for at safe places.
"""

from __future__ import annotations

import signal
from types import FrameType

_seen = False


def remember() -> None:
    """From now on, ``check`` knows of every Ctrl-C. Call it in the main thread."""
    global _seen
    _seen = False
    signal.signal(signal.SIGINT, _handle)


def check() -> None:
    """Raise ``KeyboardInterrupt`` if one came since ``remember``."""
    if _seen:
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    global _seen
    _seen = True
    raise KeyboardInterrupt
