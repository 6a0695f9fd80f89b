"""SIGKILL at a chosen write call of this process: before it, half way, having spoilt a bit, or just after it."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HOWS = BEFORE, HALF, SPOILT, AFTER = "before", "half", "spoilt", "after"
"""A spoilt write is whole but for one bit: what a disk may make of a write that nobody was promised."""

_CALLS = ("truncate", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "fdatasync")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Which write call is the last."""

    call: int
    """The first is 1."""
    how: str
    journal: bool
    """Count only what is written to a segment's journal."""
    bit: int
    """The bit that a spoilt write gets wrong, modulo its length."""


def kill_at(kill: Kill, report: Callable[[str], None]) -> None:
    """Count from now on; ``report`` gets the name of the fatal call first."""
    left = [kill.call]

    def fatal(name: str) -> bool:
        if kill.journal and name != "pwrite journal":
            return False
        left[0] -= 1
        if left[0] == 0:
            how = kill.how if "write" in name or kill.how == AFTER else BEFORE
            report(f"{name}, {how}")
        return left[0] == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(content: Any) -> bytes:
        data = bytearray(content)
        if kill.how == SPOILT:
            data[kill.bit // 8 % len(data)] ^= 1 << kill.bit % 8
        return bytes(data[: {BEFORE: 0, HALF: len(data) // 2}.get(kill.how, len(data))])

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if fatal(name):
                if kill.how == AFTER:
                    real(*arguments, **named)
                die()
            return real(*arguments, **named)

        setattr(os, name, call)

    for name in _CALLS:
        wrap(name)
    pwrite, opened = os.pwrite, io.open

    def counted(descriptor: int, content: Any, offset: int) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if fatal("pwrite journal" if path.endswith("/journal") else "pwrite"):
            pwrite(descriptor, cut(memoryview(content).cast("B")), offset)
            die()
        return pwrite(descriptor, content, offset)

    os.pwrite = counted

    class CountedFile:
        """A file opened for writing."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> CountedFile:
            return self

        def __exit__(self, *error: object) -> None:
            self._file.close()

        def write(self, content: Any) -> int:
            if fatal("write"):
                self._file.write(content[: {BEFORE: 0, HALF: len(content) // 2}.get(kill.how, len(content))])
                self._file.flush()
                die()
            return self._file.write(content)

        def truncate(self, size: int | None = None) -> int:
            if fatal("truncate"):
                if kill.how == AFTER:
                    self._file.truncate(size)
                die()
            return self._file.truncate(size)

    def open_counted(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not set("wax+") & set(mode):
            return opened(file, mode, *arguments, **named)
        if fatal("open"):
            if kill.how == AFTER:
                opened(file, mode, *arguments, **named)
            die()
        return CountedFile(opened(file, mode, *arguments, **named))

    io.open = open_counted  # type: ignore[assignment]  # pathlib opens files with it
