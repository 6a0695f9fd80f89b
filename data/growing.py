"""An array that grows at its end without being copied every time."""

from __future__ import annotations

import numpy as np


class Growing:
    """``values`` is a view of what was appended; a view taken earlier stays as it was."""

    def __init__(self, shape: tuple[int, ...] = (), dtype: type = np.int64) -> None:
        self._room: np.ndarray = np.empty((0, *shape), dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def values(self) -> np.ndarray:
        """``[appended, ...]``."""
        return self._room[: self._count]

    def append(self, values: np.ndarray) -> None:
        """Add rows."""
        count = self._count + len(values)
        if count > len(self._room):
            room = np.empty((max(1024, 2 * count), *self._room.shape[1:]), self._room.dtype)
            room[: self._count] = self.values
            self._room = room
        self._room[self._count : count] = values
        self._count = count
