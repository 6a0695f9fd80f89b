"""What a replay store's files look like: fields, and Zarr v3 metadata written by hand.

A column is one Zarr array with a single shard, whose inner chunks are uncompressed and lie in time order without gaps.
So a shard is the column's rows in C order, padded to a whole chunk, followed by the index that Zarr reads: appending is
``pwrite``, reading is ``mmap``, and any Zarr reader still fetches a few rows without the rest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data.types import NOT_OURS, UNKNOWN_TOKEN, Behaviour, Source, Spec, Success

SCHEMA = "wm-rl replay"
SCHEMA_VERSION = 2

OBSERVED = {"proprio": "<f4", "timestamp": "<f8"}
"""Columns with a value in every row, and their dtype on disk."""

ACTED = {"action": "<f4", "action_token": "<i2", "log_prob": "<f4", "reward": "<f4", "terminated": "|b1",
         "truncated": "|b1", "decision": "|b1", "policy_version": "<i8", "uncertainty": "<f4"}
"""Columns of control steps; an episode's last row holds their ``FINAL`` value."""

FINAL = {"action": 0, "action_token": UNKNOWN_TOKEN, "log_prob": np.nan, "reward": 0, "terminated": False,
         "truncated": False, "decision": False, "policy_version": NOT_OURS, "uncertainty": 0}

UNITS = {"timestamp": "s since the episode began", "action": "normalised to [-1, 1] by the store's statistics",
         "action_token": f"bin; {UNKNOWN_TOKEN}: nobody tokenised", "log_prob": "nat; NaN: unknown",
         "policy_version": f"gradient updates; {NOT_OURS}: not one of ours"}

EPISODE = ("start", "length", "decisions", "source", "task", "instruction", "success", "behaviour", "policy_version",
           "world_model_version", "commit_time", "provenance_end")
"""Columns of a segment's ``episode`` array, int64. ``start`` and ``length`` count rows and control steps. The words are
places in the segment's attributes of these names. ``commit_time`` is in ns since 1970."""

WORDS = {"source": [s.value for s in Source], "success": [s.value for s in Success],
         "behaviour": [b.value for b in Behaviour]}
"""What the codes of these columns mean, everywhere."""

FRAME_CHUNK, SMALL_CHUNK = 16, 256
"""Rows of an inner chunk: of frames, and of every other column."""

_ZARR_TYPES = {"|u1": "uint8", "|b1": "bool", "<i2": "int16", "<i8": "int64", "<u4": "uint32", "<f4": "float32",
               "<f8": "float64"}


def field_table(spec: Spec) -> dict[str, dict[str, Any]]:
    """Every per-row column: shape of one row, dtype, dimension names, unit, rows of a chunk. Stored as an attribute."""
    axes: dict[str, tuple[list[int], list[str]]] = {"proprio": ([spec.proprio_dim], ["proprio_name"])}
    axes |= {name: ([spec.action_dim], ["action_name"]) for name in ("action", "action_token", "log_prob")}
    table = {}
    for name, dtype in (OBSERVED | ACTED).items():
        shape, dimensions = axes.get(name, ([], []))
        table[name] = {"shape": shape, "dtype": dtype, "dimensions": ["time", *dimensions],
                       "unit": UNITS.get(name, ""), "chunk": SMALL_CHUNK}
    size = spec.image_size
    for camera in spec.cameras:
        table[f"rgb_{camera}"] = {"shape": [size, size, 3], "dtype": "|u1", "unit": "RGB", "chunk": FRAME_CHUNK,
                                  "dimensions": ["time", "height", "width", "channel"]}
    return table


def row_bytes(field: Mapping[str, Any]) -> int:
    """Bytes of one row of a column."""
    return math.prod(field["shape"]) * np.dtype(field["dtype"]).itemsize


def shard_bytes(field: Mapping[str, Any], rows: int) -> int:
    """Size of a column's file once it is sealed."""
    chunks = -(-rows // field["chunk"])
    return chunks * (field["chunk"] * row_bytes(field) + 16) + 4


def chunk_file(array: Path, dimensions: int) -> Path:
    """The file of an array's only (outer) chunk."""
    return array / ("c" + ".0" * dimensions)


def shard_index(field: Mapping[str, Any], rows: int) -> bytes:
    """What Zarr finds at the end of a shard: offset and size of every inner chunk, and a CRC-32C."""
    chunks = -(-rows // field["chunk"])
    size = field["chunk"] * row_bytes(field)
    index = np.empty((chunks, 2), "<u8")
    index[:, 0], index[:, 1] = np.arange(chunks, dtype="u8") * size, size
    return index_bytes(index)


def index_bytes(index: np.ndarray) -> bytes:
    """Offset and size of each chunk, ``[chunks, 2]``, with their CRC-32C."""
    content = index.astype("<u8").tobytes()
    return content + google_crc32c.value(content).to_bytes(4, "little")


def write_group(path: Path, attributes: Mapping[str, Any]) -> None:
    """Make the folder a Zarr v3 group."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "zarr.json", _group(attributes))


def sign(folder: Path, attributes: Mapping[str, Any], *, unsigned: Iterable[str]) -> dict[str, Any]:
    """A sealed segment's attributes with the CRC-32C of each file below it, and of the attributes themselves.

    ``unsigned``: columns whose shards are left out, since the ``crc32c`` array covers every episode of them.
    """
    shards = set(unsigned)
    files = {str(file.relative_to(folder)): file_checksum(file) for file in sorted(folder.glob("*/*"))
             if file.suffix != ".tmp" and (file.name == "zarr.json" or file.parent.name not in shards)}
    signed = {**attributes, "files": files}
    return {**signed, "attributes_crc32c": _attributes_checksum(signed)}


def read_signed(folder: Path) -> dict[str, Any]:
    """The attributes that ``sign`` made. Raises ``ValueError`` when ``zarr.json`` is missing, unreadable or changed."""
    try:
        content = json.loads((folder / "zarr.json").read_text())
        attributes = content["attributes"]
        intact = (content == _group(attributes)
                  and attributes["attributes_crc32c"] == _attributes_checksum(attributes))
    except FileNotFoundError:
        raise ValueError("zarr.json is missing") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError("zarr.json is not readable") from None
    if not intact:
        raise ValueError("zarr.json differs from its checksum")
    return attributes


def file_checksum(file: Path) -> int:
    """CRC-32C of a file."""
    value = 0
    with file.open("rb") as content:
        while block := content.read(2**22):
            value = google_crc32c.extend(value, block)
    return value


def _attributes_checksum(attributes: Mapping[str, Any]) -> int:
    content = {name: value for name, value in attributes.items() if name != "attributes_crc32c"}
    return google_crc32c.value(json.dumps(content, sort_keys=True).encode())


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def write_json(file: Path, content: Any) -> None:
    """Replace a JSON file in one step. One process at a time; what a killed one left is written over."""
    building = file.with_name(f"{file.name}.tmp")
    building.write_text(json.dumps(content, indent=1, allow_nan=False))
    building.rename(file)


def read_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a group."""
    return json.loads((path / "zarr.json").read_text())["attributes"]


def write_column_metadata(path: Path, field: Mapping[str, Any], rows: int, *compressor: Mapping[str, Any]) -> None:
    """``zarr.json`` of a column whose shard is in place, its inner chunks compressed or not."""
    inner = [field["chunk"], *field["shape"]]
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    sharding = {"name": "sharding_indexed", "configuration": {
        "chunk_shape": inner, "codecs": [plain, *compressor], "index_codecs": [plain, {"name": "crc32c"}],
        "index_location": "end"}}
    padded = -(-rows // field["chunk"]) * field["chunk"]
    _write_array_metadata(path, [rows, *field["shape"]], [padded, *field["shape"]], field["dtype"],
                          field["dimensions"], [sharding], {"unit": field["unit"]})


def write_array(path: Path, values: np.ndarray, *, dtype: str, dimensions: Sequence[str]) -> None:
    """A Zarr array of one uncompressed chunk, at least one value."""
    path.mkdir(exist_ok=True)
    values = np.ascontiguousarray(values, dtype)
    chunk_file(path, values.ndim).write_bytes(values.data)
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    _write_array_metadata(path, list(values.shape), list(values.shape), dtype, dimensions, [plain], {})


def read_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """What ``write_array`` wrote. Raises ``ValueError`` when the file is missing or not as long as ``shape`` says."""
    file = chunk_file(path, len(shape))
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    found = file.stat().st_size if file.exists() else 0
    if found != expected:
        raise ValueError(f"{file} should have {expected} bytes, found {found}")
    return np.fromfile(file, dtype).reshape(shape)


def _write_array_metadata(
    path: Path, shape: list[int], chunk: list[int], dtype: str, dimensions: Sequence[str],
    codecs: list[dict[str, Any]], attributes: Mapping[str, Any],
) -> None:
    kind = _ZARR_TYPES[dtype]
    write_json(path / "zarr.json", {
        "zarr_format": 3, "node_type": "array", "shape": shape, "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": False if kind == "bool" else 0, "attributes": attributes, "dimension_names": list(dimensions),
        "codecs": codecs})
