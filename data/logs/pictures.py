"""Rows of arrays as streams, for the readers of HDF5, Zarr and TFRecord: vectors, texts, and pictures on demand.

A row is a picture where it is ``[h w 3]`` or ``[3 h w]`` of uint8, ``[h w 3]`` of float levels from 0 to 255, or the
bytes of a JPEG or PNG file, which zeros may follow. JPEG colours are taken as the standard says, red first.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from data.logs.streams import Kind, Pictures, Size, Stream
from data.text import one_line

MAX_ROW = 4096
"""Numbers in a row of a vector: what is longer, and no picture, is a depth map or a stack of frames."""
MAX_VALUES = 2**26
"""Numbers in all rows of a vector, 512 MiB of them: damaged metadata may promise any size."""
MAX_PIXELS = 2**26
"""Of a picture: damaged metadata may promise any size."""
MIN_FLOAT_SIDE = 16
"""Pixels: smaller float rows of three columns are poses or points."""

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
FORMATS, MODES = ("JPEG", "PNG"), ("RGB", "RGBA", "L", "P")
"""That Pillow decodes."""

Picture = UInt8[np.ndarray, "h w 3"]


class UnusableError(Exception):
    """What is no stream, though nothing is damaged. Its text is the reason."""


class Items(Protocol):
    """What gives a row by its number."""

    def __getitem__(self, row: Any) -> Any:
        """One row, as it is stored."""
        ...


@runtime_checkable
class Rows(Protocol):
    """An array that is read row by row: an HDF5 data set, rows of a Zarr array, a list of a TFRecord."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its first axis is time."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of its elements; ``S`` where a row is bytes of any length."""
        ...

    def __getitem__(self, rows: Any) -> Any:
        """A row by its number, or all of them by ``[:]``."""
        ...


def array_stream(name: str, rows: Rows, clocks: Mapping[str, Float64[np.ndarray, " n"]], schema: str = "") -> Stream:
    """A stream of numbers, pictures or texts. Pictures are read from ``rows`` when asked for, which may be much later.

    Raises ``UnusableError`` when the rows are none of these, and what ``rows`` raises when they cannot be read.
    """
    shape, dtype = tuple(rows.shape[1:]), rows.dtype
    schema = schema or f"{dtype} {list(shape)}"
    found = _raw_picture(rows, shape, dtype)
    if found is None and (dtype.kind == "S" or (dtype == np.uint8 and len(shape) == 1)):
        first = rows[0]
        if encoded_bytes(first) is not None:
            found = encoded_picture, encoded_size(first)
        elif dtype.kind == "S":
            return _text_stream(name, rows, clocks, schema)
    if found is not None:
        decode, size = found
        return Stream(name=name, kind=Kind.IMAGE, clocks=clocks, pictures=on_demand(name, rows, decode), size=size,
                      schema=schema)
    if dtype.kind not in "biuf":
        raise UnusableError(f"of type {schema}, which is not read")
    return vector_stream(name, rows, clocks, schema)


def vector_stream(name: str, rows: Rows, clocks: Mapping[str, Float64[np.ndarray, " n"]], schema: str) -> Stream:
    """A stream of numbers, read whole as float64, which rounds integers beyond 2**53. Matrices are flattened by rows.

    Raises ``UnusableError`` when a row has no number, or more than a vector has.
    """
    count, numbers = rows.shape[0], math.prod(rows.shape[1:])
    if numbers == 0:
        raise UnusableError("without numbers in a row")
    if numbers > MAX_ROW:
        raise UnusableError(f"with rows of {list(rows.shape[1:])}, neither a vector nor an RGB picture")
    if count * numbers > MAX_VALUES:
        raise UnusableError(f"of {count} rows of {numbers} numbers, more than a log has")
    with np.errstate(invalid="ignore"):  # a signalling NaN is kept, quietly
        values = np.asarray(rows[:]).astype(np.float64).reshape(count, numbers)
    return Stream(name=name, kind=Kind.VECTOR, clocks=clocks, values=values, schema=schema)


def on_demand(name: str, rows: Items, decode: Callable[[Any, Size | None], Picture]) -> Pictures:
    """Pictures of a stream, each decoded once however often it is repeated."""

    def pictures(numbers: Sequence[int], least: Size | None = None) -> Iterator[Picture]:
        last, picture = -1, np.empty((0, 0, 3), np.uint8)
        for number in numbers:
            if number != last:
                try:
                    last, picture = number, decode(rows[number], least)
                except Exception as error:  # damaged bytes make decoders raise nearly anything
                    raise ValueError(f"{name}: picture {number} cannot be decoded ({one_line(error)})") from error
            yield picture

    return pictures


def encoded_picture(row: bytes | UInt8[np.ndarray, " b"], least: Size | None = None) -> Picture:
    """Decode the bytes of a JPEG or PNG file; ``least`` as in ``Pictures``.

    Raises ``ValueError`` or ``OSError`` when they are damaged.
    """
    content = encoded_bytes(row)
    if content is None:
        raise ValueError("expected a JPEG or PNG file, found other bytes")
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.mode not in MODES:
            raise ValueError(f"expected colours of 8 bits, found mode {image.mode}")
        return rgb(image, least)


def rgb(image: Image.Image, least: Size | None = None) -> Picture:
    """Decode an opened picture; ``least`` as in ``Pictures``: a JPEG file is then decoded to 1/2, 1/4 or 1/8."""
    if least is not None:
        height, width = image.height, image.width
        factor = next(each for each in (8, 4, 2, 1) if each == 1 or (
            height % each == width % each == 0 and height >= each * least[0] and width >= each * least[1]))
        image.draft(None, (width // factor, height // factor))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def encoded_size(row: bytes | UInt8[np.ndarray, " b"]) -> tuple[int, int] | None:
    """Height and width of a JPEG or PNG file from its header; ``None`` when that is damaged.

    Raises ``UnusableError`` when it has no colours of 8 bits: depth maps are often PNG files of 16.
    """
    try:
        with Image.open(io.BytesIO(encoded_bytes(row) or b""), formats=FORMATS) as image:
            size, mode = (image.height, image.width), image.mode
    except Exception:  # damaged bytes make decoders raise nearly anything; the pictures will say so
        return None
    if mode not in MODES:
        raise UnusableError(f"of pictures in mode {mode}, not in colours of 8 bits")
    return size


def encoded_bytes(row: bytes | UInt8[np.ndarray, " b"]) -> bytes | None:
    """The JPEG or PNG file in a row of bytes, without the zeros after it; ``None`` when there is no such file.

    Zeros would hide that a JPEG file is cut: they are decoded, as grey.
    """
    content = row if isinstance(row, bytes) else row.tobytes()
    return content.rstrip(b"\0") if content.startswith((JPEG, PNG)) else None


def index_clock(rows: int) -> dict[str, Float64[np.ndarray, " n"]]:
    """Message numbers, of a log without time."""
    return {"index": np.arange(rows, dtype=np.float64)}


def nominal_clock(rows: int, rate: float) -> dict[str, Float64[np.ndarray, " n"]]:
    """Seconds at a declared rate in Hz."""
    return {"nominal": np.arange(rows) / rate}


def recorded_clock(stamps: np.ndarray) -> dict[str, Float64[np.ndarray, " n"]] | None:
    """A column of stamps that can only be seconds: the median step is 0.2 ms to 0.5 s, far from any in milliseconds.

    ``None`` for every other column: its unit is not known.
    """
    values = np.asarray(stamps, np.float64).reshape(len(stamps), -1)
    if values.shape[1] != 1 or len(values) < 2 or not np.isfinite(values).all():
        return None
    return {"log": values[:, 0]} if 2e-4 <= np.median(np.diff(values[:, 0])) <= 0.5 else None


def is_name(name: str) -> bool:
    """A name is printable and no way out of a folder: ``obs/eef_pos``, not ``obs/../..``."""
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


def counted(skipped: Mapping[str, str]) -> tuple[str, ...]:
    """Problems of an episode: every reason once, with the names that it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name if name.isprintable() else ascii(name))
    return tuple(f"{', '.join(group[:3])}{', ...' if len(group) > 3 else ''}: {len(group)} skipped, {reason}"
                 for reason, group in names.items())


def is_label(columns: Sequence[np.ndarray]) -> bool:
    """Columns of 0 and 1, one per episode of a set, mark something: not all of them are 0 throughout."""
    return all(np.isin(column, (0, 1)).all() for column in columns) and any(map(np.any, columns))


def _raw_picture(rows: Rows, shape: tuple[int, ...], dtype: np.dtype
                 ) -> tuple[Callable[[Any, Size | None], Picture], Size | None] | None:
    """What makes a picture of a row of numbers, and its size; ``None`` where rows are none."""
    if len(shape) != 3 or min(shape) == 0 or math.prod(shape) > 3 * MAX_PIXELS:
        return None
    if dtype == np.uint8 and shape[-1] == 3:
        return _as_it_is, (shape[0], shape[1])
    if dtype == np.uint8 and shape[0] == 3:
        return _channels_last, (shape[1], shape[2])
    if dtype.kind != "f" or shape[-1] != 3 or min(shape[:2]) < MIN_FLOAT_SIDE:
        return None
    first = np.asarray(rows[0])
    if first.any() and not (first.min() >= 0 and 1 < first.max() <= 255):  # up to 1, black or white cannot be told
        raise UnusableError("of floats that are no levels from 0 to 255")
    return _levels, (shape[0], shape[1])


def _text_stream(name: str, rows: Rows, clocks: Mapping[str, Float64[np.ndarray, " n"]], schema: str) -> Stream:
    """Rows of bytes as texts, without the zeros after them. Raises ``UnusableError`` when they are none."""
    try:
        if len(rows[0]) > MAX_ROW:
            raise UnusableError("of bytes that are neither a picture nor a text")
        texts = tuple(row.rstrip(b"\0").decode() for row in rows[:])
    except UnicodeDecodeError:
        raise UnusableError("of bytes that are neither a picture nor a text") from None
    return Stream(name=name, kind=Kind.TEXT, clocks=clocks, texts=texts, schema=schema)


def _as_it_is(row: Picture, least: Size | None) -> Picture:
    return np.asarray(row)


def _channels_last(row: UInt8[np.ndarray, "3 h w"], least: Size | None) -> Picture:
    return np.ascontiguousarray(np.transpose(row, (1, 2, 0)))


def _levels(row: np.ndarray, least: Size | None) -> Picture:
    """Float levels, rounded."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is one
        levels = np.asarray(row, np.float64)
    if not (levels.min() >= 0 and levels.max() <= 255):  # also false where one is NaN
        raise ValueError(f"expected levels from 0 to 255, found {levels.min():g} to {levels.max():g}")
    return np.rint(levels).astype(np.uint8)
