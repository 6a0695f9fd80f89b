"""The cold tier: sealed segments whose frames are stored compressed. Everything else of them stays as it was.

A segment is rewritten beside in ``tmp/``, compared with the original, put on the disk, and takes the original's place
in one step: Linux swaps two folders' names at once, so a kill at any moment leaves one whole segment there. Whoever
has the original mapped keeps reading it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import math
import os
import shutil
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from PIL import Image

from data.compressed import CompressedColumn, open_compressed
from data.layout import (
    FRAME_CHUNK,
    chunk_file,
    field_table,
    index_bytes,
    read_array,
    read_attributes,
    sign,
    write_array,
    write_column_metadata,
    write_group,
)
from data.salvage import Salvage
from data.segment import checksum, sync_file, sync_tree
from data.store import store_attributes
from data.types import Spec, UserError

CODECS = ("zstd", "jpeg")
_LEVEL = 3
"""Of zstd: more takes longer and saves little on camera frames."""
_BUILDING = "compacting-"
_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What became of one segment."""

    segment: str
    before: int
    """Bytes on the disk."""
    after: int
    psnr: float | None
    """Of the worst camera, in dB; None where nothing was lost."""


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """What a run of ``compact`` did."""

    done: list[Compacted]
    skipped: list[str]
    """Segments with something wrong, left alone: ``verify`` says what."""


def compact(
    path: str | Path, *, codec: str, quality: int, keep_newest: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> CompactReport:
    """Compress the frames of all sealed hot segments but the newest ``keep_newest`` of each source.

    ``codec``: ``zstd`` loses nothing, ``jpeg`` is several times smaller and loses a little (``quality``, 1 to 95).
    The store may be in use. ``progress`` is told how many of how many segments are done.

    Raises ``UserError`` for a bad setting, a full disk, or a file system that cannot swap folders.
    """
    path = Path(path)
    spec = Spec.from_dict(store_attributes(path)["spec"])
    if codec not in CODECS:
        raise UserError(f"codec: expected {' or '.join(CODECS)}, got {codec!r}; type codec=zstd")
    if not 1 <= quality <= 95:
        raise UserError(f"quality: expected 1 to 95, got {quality}; type quality=90")
    if keep_newest < 0:
        raise UserError(f"keep_newest: expected 0 or more segments, got {keep_newest}; type keep_newest=0")
    done, skipped = [], []
    with _alone(path):
        names = _hot(path, keep_newest)
        for i, name in enumerate(names):
            progress(i, len(names))
            result = _compact(path, name, spec, codec=codec, quality=quality)
            if result is None:
                skipped.append(name)
            else:
                done.append(result)
        progress(len(names), len(names))
    return CompactReport(done=done, skipped=skipped)


def exchange(one: Path, other: Path) -> None:
    """Two folders swap their names, at once."""
    if _libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        raise UserError(f"the file system of {other} cannot swap two folders at once (renameat2), so a segment there "
                        "cannot be replaced safely; copy the store to a local disk (ext4, xfs, btrfs)")
    raise OSError(code, os.strerror(code), str(other))


def _hot(path: Path, keep_newest: int) -> list[str]:
    """Segments to compress, oldest first. One whose attributes cannot be read is left to ``verify``."""
    names: dict[str, list[str]] = defaultdict(list)
    for folder in sorted(entry for entry in (path / "seg").iterdir() if entry.is_dir()):
        try:
            attributes = read_attributes(folder)
            if attributes["tier"] == "hot":
                names[attributes["episode_source"]].append(folder.name)
        except (OSError, ValueError, KeyError):
            continue
    return sorted(name for group in names.values() for name in group[: max(0, len(group) - keep_newest)])


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time compacts; it removes what a killed one left. What the system refuses becomes one line."""
    descriptor = None
    try:
        descriptor = os.open(path / "control" / "compacting", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in (path / "tmp").glob(f"{_BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    except BlockingIOError:
        raise UserError(f"another process is compacting {path}; wait until it has ended") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        raise UserError(f"cannot rewrite a segment of {path}: {os.strerror(error.errno).lower()}; the segment stays as "
                        "it was; free some space, or make the folder writable, and type the same again") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _compact(path: Path, name: str, spec: Spec, *, codec: str, quality: int) -> Compacted | None:
    """Replace one segment; None when something is wrong with it, or it was evicted meanwhile."""
    folder, building = path / "seg" / name, path / "tmp" / f"{_BUILDING}{uuid.uuid4().hex}"
    original = Salvage(folder, spec, sealed=True)
    if original.problems:
        return None
    before = _bytes(folder)
    try:
        psnr = _rewrite(original, building, codec=codec, quality=quality)
        sync_tree(building)
        exchange(building, folder)
    except FileNotFoundError:
        shutil.rmtree(building, ignore_errors=True)
        return None
    for parent in (folder.parent, building.parent):
        sync_file(parent)
    shutil.rmtree(building, ignore_errors=True)
    return Compacted(segment=name, before=before, after=_bytes(folder), psnr=psnr)


def _rewrite(original: Salvage, building: Path, *, codec: str, quality: int) -> float | None:
    """Write the cold version of an intact segment; returns the PSNR of the worst camera."""
    fields = field_table(original.spec)
    frames = {name: field for name, field in fields.items() if name.startswith("rgb_")}
    building.mkdir()
    for source in original.path.iterdir():
        if source.is_dir() and source.name not in (*frames, "crc32c"):
            shutil.copytree(source, building / source.name, copy_function=os.link)
    attributes = read_attributes(original.path)
    names = attributes["crc32c_columns"]
    table = read_array(original.path / "crc32c", "<u4", (len(original), len(names)))
    checks = dict(zip(names, table.T, strict=True))
    psnr = []
    for name, field in frames.items():
        if codec == "zstd":
            _write_zstd(building / name, original.columns[name], field)
        else:
            checks |= _write_jpeg(building, name, original, quality)
            del checks[name]
        psnr.append(_psnr(original.columns[name], open_compressed(building, name, field, original.rows, codec)))
        if codec == "zstd" and psnr[-1] is not None:
            raise RuntimeError(f"{name} of {original.path} did not come back from zstd as it was")
    write_array(building / "crc32c", np.stack(list(checks.values()), 1), dtype="<u4", dimensions=["episode", "column"])
    worst = min((value for value in psnr if value is not None), default=None)
    description = ({"name": codec, "level": _LEVEL} if codec == "zstd" else
                   {"name": codec, "quality": quality, "psnr_db": worst})
    write_group(building, sign(building, {**attributes, "tier": "cold", "codec": description, "crc32c_columns":
                                          list(checks)}, unsigned=fields.keys() - frames.keys()))
    return worst


def _write_zstd(array: Path, frames: np.ndarray, field: Mapping[str, Any]) -> None:
    array.mkdir()
    codec, index, end = Zstd(level=_LEVEL), [], 0
    with chunk_file(array, frames.ndim).open("wb") as file:
        for begin in range(0, len(frames), field["chunk"]):
            chunk = np.zeros((field["chunk"], *field["shape"]), field["dtype"])
            rows = frames[begin : begin + field["chunk"]]
            chunk[: len(rows)] = rows
            content = codec.encode(chunk)
            file.write(content)
            index.append((end, len(content)))
            end += len(content)
        file.write(index_bytes(np.array(index)))
    compressor = {"name": "zstd", "configuration": {"level": _LEVEL, "checksum": False}}
    write_column_metadata(array, field, len(frames), compressor)


def _write_jpeg(building: Path, name: str, original: Salvage, quality: int) -> dict[str, np.ndarray]:
    """Returns the checksums of the two columns: of the JPEG files as they are stored, since decoders differ."""
    parts, spans, end = [], np.empty((original.rows, 2), np.int64), 0
    for row, frame in enumerate(original.columns[name]):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=quality)
        parts.append(file.getvalue())
        spans[row] = end, len(parts[-1])
        end += len(parts[-1])
    content = np.frombuffer(b"".join(parts), np.uint8)
    for suffix, values, dtype, dimensions in (("jpeg", content, "|u1", ["byte"]),
                                              ("span", spans, "<i8", ["time", "begin_and_size"])):
        write_array(building / f"{name}_{suffix}", values, dtype=dtype, dimensions=dimensions)
    episodes = [(start, start + length) for start, length in original.table[:, :2].tolist()]
    return {f"{name}_jpeg": np.array([checksum(content[spans[first, 0] : spans[last].sum()])
                                      for first, last in episodes]),
            f"{name}_span": np.array([checksum(spans[first : last + 1]) for first, last in episodes])}


def _psnr(frames: np.ndarray, decoded: CompressedColumn) -> float | None:
    """Peak signal-to-noise ratio in dB; None when they are equal."""
    error = 0
    for begin in range(0, len(frames), FRAME_CHUNK):
        rows = slice(begin, begin + FRAME_CHUNK)
        error += int(np.square(frames[rows].astype(np.int64) - decoded[rows]).sum())
    return 10 * math.log10(255**2 * frames.size / error) if error else None


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
