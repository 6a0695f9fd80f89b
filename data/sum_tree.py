"""Weighted draws among very many items: a tree of two levels, as wide as the square root of what it holds."""

from __future__ import annotations

import numpy as np

_NARROWEST = 64


class SumTree:
    """Items ``0, 1, 2, …`` with weights of 0 or more. ``set`` costs one node per item, ``find`` one walk per place.

    Every sum is computed from its parts, never by adding differences, and the width depends on the number of items
    alone: a tree built anew from the same weights draws the same items.
    """

    def __init__(self) -> None:
        self._nodes = np.zeros((_NARROWEST, _NARROWEST))
        """Weights, ``[nodes, width]``; nodes and width are the same power of two."""
        self._sums = np.zeros(_NARROWEST)
        self._ends = np.zeros(_NARROWEST)
        """Running sum of ``_sums``."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._ends[-1])

    @property
    def weights(self) -> np.ndarray:
        """``[items]``."""
        return self._nodes.reshape(-1)[: self._count]

    def append(self, weights: np.ndarray) -> None:
        """Add items at the end."""
        first, self._count = self._count, self._count + len(weights)
        if self._count > self._nodes.size:
            known, width = self._nodes.reshape(-1)[:first], len(self._nodes)
            while width**2 < self._count:
                width *= 2
            self._nodes = np.zeros((width, width))
            self._nodes.reshape(-1)[:first] = known
            self._sums = self._nodes.sum(axis=1)
        self.set(np.arange(first, self._count), weights)

    def set(self, items: np.ndarray, weights: np.ndarray | float) -> None:
        """Change the weights of some items."""
        self._nodes.reshape(-1)[items] = weights
        touched = np.unique(items // len(self._nodes))
        self._sums[touched] = self._nodes[touched].sum(axis=1)
        self._ends = self._sums.cumsum()

    def find(self, places: np.ndarray) -> np.ndarray:
        """Item at each place in ``[0, total)``, where every item is as wide as its weight; never one of weight 0."""
        inside = np.minimum(places, np.nextafter(self.total, 0))
        node = np.searchsorted(self._ends, inside, side="right")
        ends = self._nodes[node].cumsum(axis=1)
        rest = inside - (self._ends[node - 1] * (node > 0))
        rest = np.minimum(rest, np.nextafter(ends[:, -1], 0))  # a sum may round to more than its parts
        return node * len(self._nodes) + (ends <= rest[:, None]).sum(axis=1)
