"""Files mapped read-only into memory.

``np.memmap`` keeps a file descriptor open per file, of which a process has about a thousand; a store of a few hundred
segments has more columns than that. Here only the mapping stays, until no array looks into it any more. A mapped file
may be unlinked: what was mapped stays readable.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import weakref
from pathlib import Path

import numpy as np

from data.types import UserError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """What NumPy holds on to: the mapping goes when the last array that looks into it does."""

    def __init__(self, address: int, size: int, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, True), "typestr": dtype.str, "shape": shape}
        weakref.finalize(self, _libc.munmap, address, size).atexit = False


def map_file(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first bytes of a file as a read-only array.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is shorter than the array.
        UserError: the process may not map more files.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size == 0:
        return np.empty(shape, kind)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        found = os.fstat(descriptor).st_size
        if found < size:
            raise ValueError(f"{path} should have at least {size} bytes, found {found}")
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _FAILED:
        code = ctypes.get_errno()
        if code == errno.ENOMEM:
            raise UserError(f"cannot map {path}: this process has as many mapped files as the system allows; use "
                            "larger segments, or type sysctl vm.max_map_count=1000000")
        raise OSError(code, os.strerror(code), str(path))
    return np.asarray(_Mapping(address, size, kind, shape))


def will_need(rows: np.ndarray) -> None:
    """Ask the system to read contiguous mapped rows from disk soon, without waiting for it."""
    address = rows.__array_interface__["data"][0]
    begin = address - address % mmap.PAGESIZE
    _libc.madvise(begin, address + rows.nbytes - begin, mmap.MADV_WILLNEED)
