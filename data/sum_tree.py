"""Weighted draws among very many items: a tree of sums with wide nodes, walked for a whole batch at once."""

from __future__ import annotations

import numpy as np

_FAN = 64


class SumTree:
    """Items ``0, 1, 2, …`` with weights of 0 or more. ``append`` and ``set`` cost one path, ``find`` one walk.

    Every sum is computed from its parts, never by adding differences, so it depends on the present weights alone: a
    tree built anew from them draws the same items.
    """

    def __init__(self) -> None:
        self._levels = [np.zeros(_FAN)]
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._levels[-1].sum())

    @property
    def weights(self) -> np.ndarray:
        """``[items]``."""
        return self._levels[0][: self._count]

    def append(self, weights: np.ndarray) -> None:
        """Add items at the end."""
        first, self._count = self._count, self._count + len(weights)
        while self._count > len(self._levels[0]):
            self._levels = [np.concatenate([level, np.zeros((_FAN - 1) * len(level))]) for level in self._levels]
            self._levels.append(self._levels[-1].reshape(-1, _FAN).sum(axis=1))
        self.set(np.arange(first, self._count), weights)

    def set(self, items: np.ndarray, weights: np.ndarray | float) -> None:
        """Change the weights of some items."""
        self._levels[0][items] = weights
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            items = np.unique(items // _FAN)
            above[items] = below.reshape(-1, _FAN)[items].sum(axis=1)

    def find(self, places: np.ndarray) -> np.ndarray:
        """Item at each place in ``[0, total)``, where every item is as wide as its weight; never one of weight 0."""
        rest = np.asarray(places, float)
        walks = np.arange(len(rest))
        node = np.zeros(len(rest), np.int64)
        ends = np.zeros((len(rest), _FAN + 1))
        for level in reversed(self._levels):
            np.cumsum(level.reshape(-1, _FAN)[node], axis=1, out=ends[:, 1:])
            inside = np.minimum(rest, np.nextafter(ends[:, -1], 0))  # a sum may round to more than its parts
            child = (ends[:, 1:] <= inside[:, None]).sum(axis=1)
            rest = inside - ends[walks, child]
            node = node * _FAN + child
        return node
