"""Columns of frames that are stored compressed, read as if they were arrays.

    zstd   rgb_<camera>        the shard of a hot segment with inner codecs [bytes, zstd]: any Zarr reader opens it
    jpeg   rgb_<camera>_jpeg   uint8 [bytes], one JPEG file after another, one for each row
           rgb_<camera>_span   int64 [rows, 2], where each of them begins, and its bytes

A row's JPEG is found from its own span alone, so one damaged entry costs one episode.
"""

from __future__ import annotations

import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from PIL import Image

from data.layout import chunk_file
from data.mapping import map_file
from data.types import UserError

CACHE_BYTES = 64 * 2**20
"""Decoded frames that a process keeps, of all segments together."""


class _Cache:
    """The most recently used chunks. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._chunks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> np.ndarray | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def put(self, key: tuple[int, int], chunk: np.ndarray) -> None:
        with self._lock:
            if key in self._chunks:  # another thread decoded it too
                return
            self._chunks[key] = chunk
            self._used += chunk.nbytes
            while self._used > self._limit and len(self._chunks) > 1:
                self._used -= self._chunks.popitem(last=False)[1].nbytes


_cache = _Cache(CACHE_BYTES)
_numbers = itertools.count()


class CompressedColumn:
    """Rows of a column, read-only, decoded when asked for. Indexing copies, where a mapped array would not."""

    dtype = np.dtype("u1")

    def __init__(self, shape: tuple[int, ...], chunk: int, decode: Callable[[int], np.ndarray]) -> None:
        """``decode``: number of a chunk -> its ``chunk`` rows. Raises ``UserError`` where they are damaged."""
        self.shape, self._chunk_rows, self._decode = shape, chunk, decode
        self._number = next(_numbers)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            return self.take(np.arange(*rows.indices(len(self))))
        rows = np.asarray(rows)
        if rows.size and not -len(self) <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a column of {len(self)}")
        return self.take(np.where(rows < 0, rows + len(self), rows))

    def take(self, rows: Any, axis: int = 0, out: np.ndarray | None = None, mode: str = "clip") -> np.ndarray:
        """``np.take`` along the first axis; rows outside are clipped."""
        assert axis == 0
        assert mode == "clip"
        rows = np.clip(np.asarray(rows), 0, len(self) - 1)
        if out is None:
            out = np.empty((*rows.shape, *self.shape[1:]), self.dtype)
        chunks, within = np.divmod(rows, self._chunk_rows)
        for chunk in np.unique(chunks):
            at = chunks == chunk
            out[at] = self._chunk(int(chunk))[within[at]]
        return out

    def _chunk(self, chunk: int) -> np.ndarray:
        found = _cache.get((self._number, chunk))
        if found is None:
            found = self._decode(chunk)
            _cache.put((self._number, chunk), found)
        return found


def open_compressed(segment: Path, name: str, field: Mapping[str, Any], rows: int, codec: str) -> CompressedColumn:
    """A column of frames of a cold segment. Raises ``ValueError`` when a file is missing, too short or damaged."""
    shape = (rows, *field["shape"])
    if codec == "jpeg":
        spans = read_spans(segment, name, rows)
        jpegs = chunk_file(segment / f"{name}_jpeg", 1)
        content = map_file(jpegs, "|u1", (int(spans.sum(1).max()),))
        return CompressedColumn(shape, 1, _checked(
            lambda row: decode_jpeg(content, spans[row], field)[None], str(jpegs)))
    if codec != "zstd":
        raise ValueError(f"{name} has codec {codec!r}, expected zstd or jpeg")
    file = chunk_file(segment / name, len(shape))
    content, index, intact = read_shard(file, -(-rows // field["chunk"]))
    if not intact or int(index[-1].sum()) + index.nbytes + 4 != len(content):
        raise ValueError(f"{file} has a damaged index")
    return CompressedColumn(shape, field["chunk"], _checked(
        lambda chunk: decode_zstd(content, index[chunk], field), str(file)))


def read_shard(file: Path, chunks: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """A shard's bytes, offset and size of its chunks ``[chunks, 2]``, and whether these have their checksum.

    Raises ``ValueError`` when the file is missing, or too short for the index.
    """
    found = file.stat().st_size if file.exists() else 0
    end = found - 16 * chunks - 4
    if end < 0:
        raise ValueError(f"{file} should have more than {16 * chunks} bytes, found {found}")
    content = map_file(file, "|u1", (found,))
    index = content[end:-4].tobytes()
    intact = google_crc32c.value(index) == int.from_bytes(content[-4:].tobytes(), "little")
    return content, np.frombuffer(index, "<u8").reshape(chunks, 2), intact


def read_spans(segment: Path, name: str, rows: int) -> np.ndarray:
    """``[rows, 2]``: first byte and size of every row's JPEG. Raises ``ValueError`` when the file is too short."""
    file = chunk_file(segment / f"{name}_span", 2)
    if not file.exists():
        raise ValueError(f"{file} is missing")
    return map_file(file, "<i8", (rows, 2))


def decode_zstd(content: np.ndarray, span: np.ndarray, field: Mapping[str, Any]) -> np.ndarray:
    """The rows of one inner chunk. Raises ``ValueError`` when it is damaged."""
    begin, size = map(int, span)
    shape = (field["chunk"], *field["shape"])
    try:
        rows = np.frombuffer(Zstd().decode(content[begin : begin + size].tobytes()), field["dtype"]).reshape(shape)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    return rows


def decode_jpeg(content: np.ndarray, span: np.ndarray, field: Mapping[str, Any]) -> np.ndarray:
    """One frame. Raises ``ValueError`` when it is damaged."""
    begin, size = map(int, span)
    try:
        frame = np.asarray(Image.open(io.BytesIO(content[begin : begin + size].tobytes()), formats=["JPEG"]))
    except (OSError, SyntaxError) as error:
        raise ValueError(str(error)) from None
    if list(frame.shape) != field["shape"]:
        raise ValueError(f"a frame of {frame.shape}, expected {field['shape']}")
    return frame


def _checked(decode: Callable[[int], np.ndarray], file: str) -> Callable[[int], np.ndarray]:
    """``decode`` for readers: the result cannot be written to, an error says what to type."""

    def checked(chunk: int) -> np.ndarray:
        try:
            rows = decode(chunk)
        except ValueError as error:
            store = Path(file).parents[3]
            raise UserError(f"damaged segment: {file}: {error}; restore it, or type python main.py store "
                            f"action=verify repair=true store={store}") from None
        rows.flags.writeable = False
        return rows

    return checked
