"""Which reader reads a file or folder: the first that recognises its content."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from data.logs.streams import Log, Reader
from data.types import UserError

READERS = ("lerobot", "ros", "foxglove", "minari", "hdf5", "zarr_v2", "rlds")
"""Modules of this package, asked in this order."""


def reader(name: str) -> Reader:
    """The module of a family of formats; imported only when asked for, with the libraries it needs."""
    module: Reader = importlib.import_module(f"data.logs.{name}")  # type: ignore[assignment] # a module as a protocol
    return module


def recognise(path: Path, family: str | None = None) -> str | None:
    """Name of the reader whose format this is; ``family`` asks only that one."""
    for name in READERS if family is None else (family,):
        if reader(name).sniff(path) is not None:
            return name
    return None


def find_logs(source: Path, family: str | None = None) -> list[tuple[str, Path]]:
    """Every log at or below ``source``, in the order of their names, with its reader.

    Raises ``UserError`` when there is none.
    """
    if family is not None and family not in READERS:
        raise UserError(f"format: expected one of {', '.join(READERS)} or null, got {family!r}")
    if not source.exists():
        raise UserError(f"source={source}: no such file or folder")
    found = list(_below(source, family))
    if not found:
        raise UserError(f"source={source}: no log of a known format in it; known are LeRobot sets, ROS 1 and 2 bags, "
                        "Foxglove MCAP, HDF5, Minari, Zarr replay buffers and TFRecord sets")
    return found


def open_log(family: str, path: Path) -> Log:
    """Open with one reader. Raises ``UserError`` when there is nothing to read."""
    return reader(family).open_log(path)


def _below(path: Path, family: str | None) -> Iterator[tuple[str, Path]]:
    name = recognise(path, family)
    if name is not None:
        yield name, path
    elif path.is_dir() and not path.is_symlink():
        for child in sorted(path.iterdir()):
            yield from _below(child, family)
