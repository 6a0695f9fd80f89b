"""One resume point: everything a run needs to go on, in one file that is either whole or not there.

It ends in the SHA-256 of what comes before: a file of tensors with a flipped byte loads without a word otherwise.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from data.types import UserError

_MARK = b"sha256"
_TRAILER = len(_MARK) + hashlib.sha256().digest_size


def save_checkpoint(folder: Path, number: int, state: dict[str, Any], *, keep: int) -> None:
    """Write ``<folder>/<number>.pt`` by rename, synced to disk, then delete all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{number}.pt.partial"
    with partial.open("w+b") as file:
        torch.save(state, file)
        file.write(_MARK + _digest(file, file.tell()))
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / f"{number}.pt")
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    for _, path in _numbered(folder)[:-keep]:
        path.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, tensors and plain values only (no pickled code is run); None where there is none.

    Raises:
        UserError: the file is damaged. Its message says how to leave it behind; nothing falls back by itself.
    """
    found = _numbered(folder)
    if not found:
        return None
    path = found[-1][1]
    try:
        with path.open("rb") as file:
            _verify(file)
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        why = str(error) if isinstance(error, _DamagedError) else type(error).__name__
        raise UserError(f"checkpoint {path} is damaged ({why}); move it away to resume from the one before: "
                        f"mv {path} {path}.damaged") from error


class _DamagedError(Exception):
    """Not what was written."""


def _verify(file: BinaryIO) -> None:
    length = file.seek(0, os.SEEK_END) - _TRAILER
    file.seek(max(length, 0))
    trailer = file.read()
    if not trailer.startswith(_MARK) or len(trailer) < _TRAILER:
        raise _DamagedError("it does not end in its checksum: cut off, or written before checkpoints had one")
    if _digest(file, length) != trailer[len(_MARK):]:
        raise _DamagedError("its checksum does not match")
    file.seek(0)


def _digest(file: BinaryIO, length: int) -> bytes:
    """Of the first ``length`` bytes; leaves the file at their end."""
    file.seek(0)
    found = hashlib.sha256()
    while piece := file.read(min(2**20, length - file.tell())):
        found.update(piece)
    return found.digest()


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.glob("*.pt") if folder.is_dir() else []
    return sorted((int(path.stem), path) for path in paths if re.fullmatch(r"\d+", path.stem))
