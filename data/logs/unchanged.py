"""Files that are read a second time, by another process: they must be those of the first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class SeenFile(NamedTuple):
    """A file as it was."""

    path: Path
    size: int
    changed: int
    """ns."""

    def check(self) -> None:
        """Raise ``ValueError`` unless it is still so, ``OSError`` where it is gone."""
        if see(self.path) != self:
            raise ValueError(f"{self.path.name} has changed since it was read; is the log being written?")


def see(path: Path) -> SeenFile:
    """The file as it is. Raises ``OSError`` when there is none."""
    stat = path.stat()
    return SeenFile(path, stat.st_size, stat.st_mtime_ns)
