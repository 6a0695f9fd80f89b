"""One resume point: everything a run needs to go on, in one file that is either whole or not there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from data.types import UserError


def save_checkpoint(folder: Path, number: int, state: dict[str, Any], *, keep: int) -> None:
    """Write ``<folder>/<number>.pt`` by rename, synced to disk, then delete all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{number}.pt.partial"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / f"{number}.pt")
    for _, path in _numbered(folder)[:-keep]:
        path.unlink()


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint, tensors and plain values only (no pickled code is run); None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    found = _numbered(folder)
    if not found:
        return None
    path = found[-1][1]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"checkpoint {path} is damaged ({type(error).__name__}); move it away to resume from the one "
                        f"before: mv {path} {path}.damaged") from error


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    paths = folder.glob("*.pt") if folder.is_dir() else []
    return sorted((int(path.stem), path) for path in paths if re.fullmatch(r"\d+", path.stem))
