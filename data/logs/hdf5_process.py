"""Read HDF5 files in a process of their own: on damaged bytes libhdf5 may crash, hang, or ask for all memory.

One such process serves all files. It is asked one thing at a time and answers in JSON and raw bytes, never in pickles.
When it dies of a file or does not answer, that is an ``OSError``, and the next question starts it anew. Links, and data
sets whose values lie in another file, are named and never followed.

Run as a script, this module is that process.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np

WAIT_S = 30.0
"""Longest wait for an answer."""
MEMORY_BYTES = 8 * 2**30
"""Address space of the process."""
CACHE_BYTES = 2**25
"""Decompressed chunks that are kept of a data set: frames are often compressed several to a chunk."""


class Hdf5Rows:
    """The rows of a data set, read when indexed. Numbers come as arrays, texts and blobs as bytes."""

    def __init__(self, file: Path, path: str, found: dict[str, Any]) -> None:
        """``found``: what ``list_series`` answered."""
        self._file, self._path = file, path
        self.shape: tuple[int, ...] = tuple(found["shape"])
        self.dtype = np.dtype(found["dtype"])
        """``S`` for texts and blobs of any length, ``O`` for what is not read at all."""
        self.schema: str = found["schema"]
        self.missing: str = found["missing"]
        """What HDF5 would make up since its writer never came to write it; empty where all is there."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        """A row by its number, or a slice of rows. Raises ``OSError`` when they are damaged."""
        if not isinstance(rows, slice):
            return self._read(int(rows), int(rows) + 1)[0]
        start, stop, step = rows.indices(len(self))
        return self._read(start, stop)[::step]

    def _read(self, start: int, stop: int) -> Any:
        found, content = ask("read", self._file, self._path, start, stop)
        if "lengths" not in found:
            return np.frombuffer(content, found["dtype"]).reshape(found["shape"])
        ends = np.cumsum(found["lengths"]).tolist()
        return [content[end - length : end] for end, length in zip(ends, found["lengths"], strict=True)]


def list_children(file: Path, group: str) -> dict[str, str]:
    """Whether each name in a group is a ``group``, a ``dataset``, or a ``link``, which is not followed.

    Empty when there is no such group. Raises ``OSError`` when the file is cut, damaged or no HDF5.
    """
    return ask("children", file, group)[0]


def read_attributes(file: Path, group: str) -> dict[str, Any]:
    """Attributes that are text, numbers, flags or lists of them. Raises ``OSError``."""
    return ask("attributes", file, group)[0]


def list_series(file: Path, group: str) -> tuple[dict[str, Hdf5Rows], dict[str, str]]:
    """Data sets at any depth by their path below a group, and why others were skipped. A scalar has one row.

    Raises ``OSError`` when the file is cut or damaged.
    """
    found, skipped = ask("series", file, group)[0]
    return {name: Hdf5Rows(file, f"{group}/{name}", entry) for name, entry in found.items()}, skipped


def ask(operation: str, file: Path, *arguments: str | int) -> tuple[Any, bytes]:
    """Ask the process. Raises ``OSError`` with the reason when it cannot answer."""
    global _process
    with _lock:
        if _process is None:
            _process = _Process()
        process, _process = _process, None  # put back once it has answered: half an answer would be the next one's
        try:
            answer, content = process.ask([operation, str(file.absolute()), *arguments])
        except TimeoutError:
            raise OSError(f"the HDF5 library gave no answer within {WAIT_S:g} s; damaged?") from None
        except (OSError, EOFError):
            raise OSError("the HDF5 library crashed on it; damaged?") from None
        else:
            _process = process
        finally:
            if _process is None:
                process.close()
    if "error" in answer:
        raise OSError(answer["error"].replace(str(file.absolute()), file.name))
    return answer["value"], content


class _Process:
    """The parent's end."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            # -P: the folder of this file, and what is named like a package there, stays out of its imports
            self._child = subprocess.Popen([sys.executable, "-P", __file__, str(theirs.fileno())],
                                           pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)

    def ask(self, question: list[str | int]) -> tuple[Any, bytes]:
        self._pipe.send_bytes(json.dumps(question).encode())
        if not self._pipe.poll(WAIT_S):
            raise TimeoutError
        return json.loads(self._pipe.recv_bytes()), self._pipe.recv_bytes()

    def close(self) -> None:
        self._pipe.close()
        self._child.kill()
        self._child.wait()


_process: _Process | None = None
_lock = threading.Lock()


@atexit.register
def _close() -> None:
    if _process is not None:
        _process.close()


def _forget() -> None:
    """In a forked process: what it inherits is its parent's."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def _serve(pipe: Connection) -> None:
    """Answer until the other end closes."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which may still ask
    opened: tuple[Any, h5py.File] | None = None
    while True:
        operation, path, *arguments = json.loads(pipe.recv_bytes())
        content = b""
        try:
            stat = os.stat(path)
            version = path, stat.st_size, stat.st_mtime_ns
            if opened is None or opened[0] != version:
                if opened:
                    opened[1].close()
                opened = None
                with h5py.File(path, "r"):  # fails while another process writes to it
                    pass
                opened = version, h5py.File(path, "r", rdcc_nbytes=CACHE_BYTES, locking=False)  # and lets others write
            value = _OPERATIONS[operation](opened[1], *arguments)
            if operation == "read":
                value, content = value
            answer = {"value": value}
        except Exception as error:  # damaged bytes make libhdf5 and h5py raise nearly anything
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        pipe.send_bytes(json.dumps(answer).encode())
        pipe.send_bytes(content)


def _find(file: h5py.File, path: str) -> Any:
    """A group or data set; ``None`` where a part of the path is missing, or a link."""
    item: Any = file
    for part in filter(None, path.split("/")):
        if not isinstance(item, h5py.Group) or not isinstance(item.get(part, getlink=True), h5py.HardLink):
            return None
        item = item[part]
    return item


def _children(file: h5py.File, path: str) -> dict[str, str]:
    group = _find(file, path)
    if not isinstance(group, h5py.Group):
        return {}
    kinds = {str(name): _find(group, name) if isinstance(name, str) else None for name in group}  # bytes: no UTF-8
    return {name: "link" if item is None else "group" if isinstance(item, h5py.Group) else "dataset"
            for name, item in kinds.items()}


def _attributes(file: h5py.File, path: str) -> dict[str, Any]:
    item = _find(file, path)
    if item is None:
        return {}
    return {key: value for key in item.attrs if (value := _attribute(item.attrs, key)) is not None}


def _attribute(attributes: h5py.AttributeManager, key: str) -> Any:
    """As str, number, bool or a list; ``None`` for one of any other type, or damaged."""
    try:
        value = attributes[key]
    except Exception:  # damaged bytes make libhdf5 and h5py raise nearly anything
        return None
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return value if all(isinstance(part, str | bool | int | float) for part in value) else None
    return value if isinstance(value, str | bool | int | float) else None


def _series(file: h5py.File, path: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    found: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    group = _find(file, path)
    if group is None:  # a link, or a name that leads nowhere
        return found, skipped

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        if item.shape is None:
            skipped[name] = "empty"
        elif item.external or item.is_virtual:
            skipped[name] = "with values in another file"
        else:
            found[name] = {"shape": item.shape or (1,), "dtype": _dtype(item), "missing": _missing(item),
                           "schema": f"{item.dtype} {list(item.shape[1:])}"}

    def visit_link(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink):
            skipped[name] = "links, which are not followed"

    try:
        group.visititems(visit)  # every object once, so a loop of links ends
        group.visititems_links(visit_link)
    except (TypeError, SystemError) as error:  # h5py mixes up bytes and text there
        raise OSError("it holds a name that is not UTF-8") from error
    return found, skipped


def _dtype(dataset: h5py.Dataset) -> str:
    dtype = dataset.dtype
    if dtype.kind in "biuf":
        return dtype.str
    is_blob = dtype.kind == "S" or h5py.check_string_dtype(dtype) or h5py.check_vlen_dtype(dtype) == np.uint8
    return "S" if dataset.ndim < 2 and is_blob else "O"


def _missing(dataset: h5py.Dataset) -> str:
    expected, written = int(dataset.size > 0), int(dataset.id.get_storage_size() > 0)
    if dataset.chunks:
        expected = math.prod(-(-size // chunk) for size, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
    return f"{expected - written} of {expected} chunks were never written" if written < expected else ""


def _read(file: h5py.File, path: str, start: int, stop: int) -> tuple[dict[str, Any], bytes]:
    dataset = _find(file, path)
    rows = dataset[start:stop] if dataset.ndim else np.atleast_1d(dataset[()])
    if rows.dtype.kind in "biuf":
        return {"dtype": rows.dtype.str, "shape": rows.shape}, np.ascontiguousarray(rows).tobytes()
    blobs = [row if isinstance(row, bytes) else row.tobytes() for row in rows]
    return {"lengths": [len(blob) for blob in blobs]}, b"".join(blobs)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "children": _children, "attributes": _attributes, "series": _series, "read": _read}

if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
