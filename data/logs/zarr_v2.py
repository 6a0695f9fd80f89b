"""Read Zarr v2 replay buffers of Diffusion Policy and UMI, a folder or a ``.zarr.zip``, in place.

    data/<name>          rows of all episodes, one after the other: actions, states, pictures
    meta/episode_ends    row after the last one of each episode

Only arrays of numbers are opened, and only with codecs that are known to hold nothing but data: an array of objects
could run code. Zarr takes a chunk that is not there for zeros; here it costs the episode.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Int64
from zarr.storage import LocalStore, ZipStore

from data.lerobot import file_sha256
from data.logs.hdf5 import INSTRUCTIONS, TIMES, as_json, describe, described_rate, described_text
from data.logs.pictures import (
    UnusableError,
    array_stream,
    counted,
    index_clock,
    is_name,
    nominal_clock,
    recorded_clock,
)
from data.logs.streams import LogEpisode, Refused
from data.text import one_line
from data.types import UserError

ENDS = "meta/episode_ends"
CODECS = frozenset(("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma", "delta", "shuffle", "crc32", "adler32"))
IMAGE_CODEC = re.compile(r"imagecodecs_[a-z0-9]+")
"""UMI compresses pictures with ``imagecodecs_jpegxl``."""
MAX_CHUNK_BYTES = 2**30
MAX_JSON_BYTES = 2**20
CODEC_BYTES = 2**12
"""That a codec may add to a chunk, besides as many bytes again as its numbers have."""
BLOSC_HEADER = 16
"""Bytes; the last four are the size of the compressed chunk."""
ZIP_MAGIC = b"PK\x03\x04"


class ZarrLog:
    """An opened replay buffer. Use ``open_log``."""

    def __init__(self, path: Path) -> None:
        """List arrays and episodes. Raises ``UserError`` when there is none."""
        self.path = path
        self.format = f"Zarr v2 replay buffer ({'folder' if path.is_dir() else 'zip'})"
        try:
            self._tree = _Tree(path)
            ends = self._tree.array(ENDS)
            self._ends = _as_ends(ends)
        except Exception as error:  # damaged bytes make zarr, zipfile and codecs raise nearly anything
            raise UserError(f"{path}: expected a Zarr v2 replay buffer with episodes, found none: {one_line(error)}; "
                            "check the path, or copy it again") from None
        self._arrays: dict[str, _Array] = {}
        self._skipped: dict[str, str] = {}
        for name in self._tree.arrays("data/"):
            try:
                self._arrays[name] = self._tree.array(f"data/{name}")
            except UnusableError as error:
                self._skipped[name] = str(error)
            except Exception as error:  # damaged metadata make zarr raise nearly anything
                self._skipped[name] = f"damaged ({one_line(error)})"
        if not self._arrays:
            raise UserError(f"{path}: expected arrays of numbers in data/, found none "
                            f"({'; '.join(counted(self._skipped)) or 'it is empty'}); check the path")
        self._described = describe(*(self._tree.json(f"{group}.zattrs") for group in ("", "meta/", "data/")))

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """In the order of the rows. What contradicts ``episode_ends`` is refused."""
        begin, furthest = 0, 0
        for number, end in enumerate(self._ends.tolist()):
            name = f"episode {number}"
            if begin < furthest or end <= begin:
                yield Refused(name=name, reason=f"{ENDS} says rows {begin} to {end}, after an episode that ends at "
                                                f"{furthest}; its rows cannot be told")
            else:
                try:
                    yield self._episode(name, begin, end)
                except (UnusableError, ValueError) as error:
                    yield Refused(name=name, reason=one_line(error))
            begin, furthest = end, max(furthest, end)
        rows = max(len(array) for array in self._arrays.values())
        if rows > furthest:
            yield Refused(name=f"rows {furthest} to {rows}", reason=f"{ENDS} gives them to no episode; cut recording?")

    def _episode(self, name: str, begin: int, end: int) -> LogEpisode:
        for key, array in self._arrays.items():
            if len(array) < end:
                raise ValueError(f"{key} has {len(array)} rows, the episode is rows {begin} to {end}; half-written?")
            array.check_chunks(begin, end)
        clocks, clock_from = self._clock(begin, end)
        streams, skipped = {}, dict(self._skipped)
        for key, array in self._arrays.items():
            try:
                streams[key] = array_stream(key, _Slice(array, begin, end), clocks)
            except UnusableError as error:
                skipped[key] = str(error)
            except Exception as error:  # damaged chunks make codecs raise nearly anything
                raise ValueError(f"{key} cannot be read ({one_line(error)})") from error
        return LogEpisode(
            name=name, streams=streams, instruction=described_text(self._described, INSTRUCTIONS),
            problems=counted(skipped), sha256=hashlib.sha256(f"{self._hash} {name}".encode()).hexdigest(),
            facts={"format": self.format, "file": self.path.name, "rows": end - begin, "first_row": begin,
                   "clock": clock_from})

    def _clock(self, begin: int, end: int) -> tuple[Mapping[str, Any], str]:
        """Clocks of every stream of an episode, and what they come from."""
        for key in TIMES:
            array = self._arrays.get(key)
            if array is not None and array.dtype.kind == "f" and array.shape[1:] in ((), (1,)):
                try:
                    clock = recorded_clock(array[begin:end])
                except Exception as error:  # damaged chunks make codecs raise nearly anything
                    raise ValueError(f"{key} cannot be read ({one_line(error)})") from error
                if clock is not None:
                    return clock, f"{key}, in seconds"
        rate = described_rate(self._described)
        if rate is None:
            return index_clock(end - begin), "none"
        return nominal_clock(end - begin, rate), f"declared, {rate:g} Hz"

    @cached_property
    def _hash(self) -> str:
        """Of the zip file, or of the names and bytes of all files of the folder."""
        if self.path.is_file():
            return file_sha256(self.path)
        files = "".join(f"{name!a} {file_sha256(self.path / name)}\n" for name in sorted(self._tree.sizes))
        return hashlib.sha256(files.encode()).hexdigest()


class _Tree:
    """Files of a replay buffer by their names in it."""

    def __init__(self, path: Path) -> None:
        """Raises ``UnusableError`` when there is no ``meta/episode_ends``, and what ``zipfile`` raises."""
        self._zip = None if path.is_dir() else zipfile.ZipFile(path)
        self._path = path
        if self._zip is None:
            files = [file for file in path.rglob("*") if file.is_file()]
            self.sizes = {str(file.relative_to(path)): file.stat().st_size for file in files}
        else:
            self.sizes = {info.filename: info.file_size for info in self._zip.infolist()}
        self._root = next((name.removesuffix(f"{ENDS}/.zarray") for name in sorted(self.sizes)
                           if name.endswith(f"{ENDS}/.zarray")), None)
        if self._root is None:
            raise UnusableError(f"no {ENDS}")
        self._store = LocalStore(path, read_only=True) if self._zip is None else ZipStore(path, mode="r")

    def arrays(self, group: str) -> list[str]:
        """Names of the arrays below a group, those that are names."""
        found = re.compile(rf"{re.escape(f'{self._root}{group}')}(.+)/\.zarray", re.DOTALL)
        matches = (found.fullmatch(name) for name in sorted(self.sizes))
        return [match[1] for match in matches if match and is_name(match[1])]

    def size(self, name: str) -> int | None:
        """Bytes of a file; ``None`` when there is no such file."""
        return self.sizes.get(f"{self._root}{name}")

    def beginning(self, name: str, size: int) -> bytes:
        """The first bytes of a file. Raises ``ValueError``."""
        try:
            with (self._zip.open(f"{self._root}{name}") if self._zip else
                  (self._path / f"{self._root}{name}").open("rb")) as file:
                return file.read(size)
        except Exception as error:  # damaged bytes make zipfile raise nearly anything
            raise ValueError(f"{name} cannot be read ({one_line(error)})") from error

    def json(self, name: str) -> dict[str, Any]:
        """A file of JSON; empty when it is missing, damaged or holds no object."""
        name = f"{self._root}{name}"
        if self.sizes.get(name, MAX_JSON_BYTES) >= MAX_JSON_BYTES:
            return {}
        try:
            content = self._zip.read(name) if self._zip else (self._path / name).read_bytes()
        except Exception:  # damaged bytes make zipfile raise nearly anything
            return {}
        found = as_json(content.decode(errors="replace"))
        return found if isinstance(found, dict) else {}

    def array(self, name: str) -> _Array:
        """Raises ``UnusableError`` when it is not one of numbers, and what zarr raises when it is damaged."""
        metadata = self.json(f"{name}/.zarray")
        _check_metadata(metadata)
        return _Array(self, name, metadata, zarr.open_array(
            store=self._store, path=f"{self._root}{name}", mode="r", zarr_format=2))


class _Array:
    """Rows of an array; of pictures that share a chunk, the last chunk read is kept."""

    def __init__(self, tree: _Tree, name: str, metadata: Mapping[str, Any], array: Any) -> None:
        self._tree, self._name, self._array = tree, name, array
        self._separator: str = metadata.get("dimension_separator", ".")
        self._blosc = (metadata.get("compressor") or {}).get("id") == "blosc"
        self._kept: tuple[int, np.ndarray] | None = None
        self.shape: tuple[int, ...] = array.shape
        self.dtype: np.dtype = array.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> np.ndarray:
        if isinstance(rows, slice):
            return np.asarray(self._array[rows])
        size = self._array.chunks[0]
        if self._kept is None or self._kept[0] != rows // size:
            self._kept = rows // size, np.asarray(self._array[rows // size * size : (rows // size + 1) * size])
        return self._kept[1][rows % size]

    def check_chunks(self, begin: int, end: int) -> None:
        """Raises ``ValueError`` when a chunk of these rows is missing, cut, or larger than its numbers need.

        Blosc is not told how long a chunk is: of a cut one it would decode whatever lies behind it in memory.
        """
        chunks = self._array.chunks
        limit = 2 * math.prod(chunks) * self.dtype.itemsize + CODEC_BYTES
        ranges = [range(begin // chunks[0], -(-end // chunks[0])),
                  *(range(-(-size // chunk)) for size, chunk in zip(self.shape[1:], chunks[1:], strict=True))]
        for chunk in itertools.product(*ranges):
            key = self._separator.join(map(str, chunk))
            size = self._tree.size(f"{self._name}/{key}")
            if size is None:
                raise ValueError(f"{self._name}: chunk {key} is missing; copy the set again, or, if zarr 3 wrote it, "
                                 "write it with write_empty_chunks=True")
            if size > limit:
                raise ValueError(f"{self._name}: chunk {key} has {size} bytes, expected at most {limit}")
            if self._blosc:
                said = int.from_bytes(self._tree.beginning(f"{self._name}/{key}", BLOSC_HEADER)[12:], "little")
                if size != max(said, BLOSC_HEADER):
                    raise ValueError(f"{self._name}: chunk {key} has {size} bytes, its header says {said}; cut? copy "
                                     "the set again")


class _Slice:
    """The rows of one episode."""

    def __init__(self, array: _Array, begin: int, end: int) -> None:
        self._array, self._begin, self._end = array, begin, end
        self.shape = (end - begin, *array.shape[1:])
        self.dtype = array.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return self._array[self._begin : self._end][rows]
        if not 0 <= rows < self.shape[0]:
            raise IndexError(f"row {rows} of {self.shape[0]}")
        return self._array[self._begin + rows]


def sniff(path: Path) -> str | None:
    """``Zarr v2 replay buffer`` of a folder or zip archive that holds ``meta/episode_ends``; never raises."""
    try:
        if path.is_dir():
            return "Zarr v2 replay buffer" if (path / ENDS / ".zarray").is_file() else None
        with path.open("rb") as file:
            if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:
                return None
        with zipfile.ZipFile(path) as archive:
            found = any(name.endswith(f"{ENDS}/.zarray") for name in archive.namelist())
    except Exception:  # damaged bytes make zipfile raise nearly anything
        found = ".zarr" in path.name  # cut archives have lost their list of names
    return "Zarr v2 replay buffer" if found else None


def open_log(path: Path) -> ZarrLog:
    """Open a replay buffer. Raises ``UserError`` when it is none, damaged or without episodes."""
    return ZarrLog(path)


def _as_ends(array: _Array) -> Int64[np.ndarray, " e"]:
    """Raises ``UnusableError`` or ``ValueError`` when these are no row numbers."""
    if len(array.shape) != 1 or array.dtype.kind not in "iu" or not len(array):
        raise UnusableError(f"{ENDS} has shape {list(array.shape)} and type {array.dtype}, expected row numbers")
    array.check_chunks(0, len(array))
    return array[:].astype(np.int64)


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raises ``UnusableError`` unless ``.zarray`` says an array of numbers, in codecs that hold nothing but data."""
    shape, chunks, dtype = (metadata.get(key) for key in ("shape", "chunks", "dtype"))
    if not (isinstance(shape, list) and isinstance(chunks, list) and 0 < len(shape) == len(chunks) <= 8
            and all(isinstance(size, int) and 0 <= size < 2**40 for size in shape)
            and all(isinstance(size, int) and 0 < size < 2**40 for size in chunks)):
        raise UnusableError("with damaged metadata")
    if not isinstance(dtype, str) or not re.fullmatch(r"[<>|][biuf](1|2|4|8)", dtype):
        raise UnusableError(f"of type {dtype!a}, which is not read")
    if math.prod(chunks) * int(dtype[2:]) > MAX_CHUNK_BYTES:
        raise UnusableError("with chunks of more than 1 GiB")
    filters = metadata.get("filters") or []
    for codec in (*(filters if isinstance(filters, list) else [filters]), metadata.get("compressor")):
        kind = codec.get("id") if isinstance(codec, dict) else codec
        if isinstance(kind, str) and IMAGE_CODEC.fullmatch(kind):
            _register(kind)
        elif kind is not None and kind not in CODECS:
            raise UnusableError(f"in the codec {kind!a}, which is not read")


def _register(codec: str) -> None:
    """Teach numcodecs a codec of imagecodecs. Raises ``UnusableError`` when that is not installed."""
    try:
        from imagecodecs.numcodecs import register_codecs
    except ImportError:
        raise UnusableError(f"in the codec {codec}; to read it, type pip install imagecodecs") from None
    register_codecs([codec], verbose=False)
