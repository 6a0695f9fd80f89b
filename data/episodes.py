"""The table of a store's episodes: what a sampler draws from and a report counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from data.layout import EPISODE
from data.segment import Segment

_COLUMN = {name: i for i, name in enumerate(EPISODE)}


class Episodes:
    """All visible episodes in order of commit, one NumPy column per property, ``[episodes]`` each."""

    def __init__(self, table: np.ndarray, words: Mapping[str, list[str]], segments: Sequence[Segment]) -> None:
        self._table, self._words, self._segments = table, words, segments

    def __len__(self) -> int:
        return len(self._table)

    def only(self, episodes: np.ndarray) -> Episodes:
        """The table of these episodes alone."""
        return Episodes(self._table[episodes], self._words, self._segments)

    def code(self, name: str) -> np.ndarray:
        """Integers of one of the ``EPISODE`` columns; what a word's code means is the same for all segments."""
        return self._table[:, 2 + _COLUMN[name]]

    def rows(self, first: int, last: int) -> np.ndarray:
        """``[last - first, columns]`` of the ``EPISODE`` columns, words coded alike for all segments."""
        return self._table[first:last, 2:]

    def words(self, name: str, episodes: np.ndarray) -> list[str]:
        """Source, task, instruction, success or behaviour of some episodes."""
        words = self._words[name]
        return [words[code] for code in self.code(name)[episodes].tolist()]

    @property
    def place(self) -> np.ndarray:
        """The place of its segment in ``ReplayStore.segments``."""
        return self._table[:, 0]

    @property
    def row(self) -> np.ndarray:
        """Its index among the segment's episodes."""
        return self._table[:, 1]

    @property
    def start(self) -> np.ndarray:
        """Its first row in the segment's arrays."""
        return self.code("start")

    @property
    def length(self) -> np.ndarray:
        """Control steps ``t``; the episode takes ``t + 1`` rows."""
        return self.code("length")

    @property
    def policy_version(self) -> np.ndarray:
        """The newest version that acted."""
        return self.code("policy_version")

    @property
    def world_model_version(self) -> np.ndarray:
        """Of what imagined it; -1 elsewhere."""
        return self.code("world_model_version")

    @cached_property
    def segment(self) -> np.ndarray:
        """Name of the segment it lies in."""
        return np.array([segment.name for segment in self._segments] or [""])[self._table[:, 0]]

    @cached_property
    def source(self) -> np.ndarray:
        """Sim, real or imagined."""
        return self._decoded("source")

    @cached_property
    def task(self) -> np.ndarray:
        """Names of tasks."""
        return self._decoded("task")

    @cached_property
    def instruction(self) -> np.ndarray:
        """What the policy is told."""
        return self._decoded("instruction")

    @cached_property
    def success(self) -> np.ndarray:
        """Yes, no or unknown."""
        return self._decoded("success")

    @cached_property
    def behaviour(self) -> np.ndarray:
        """As read: ``cloned`` where an overlay labels an unknown one."""
        return self._decoded("behaviour")

    def _decoded(self, name: str) -> np.ndarray:
        return np.array(self._words[name] or [""])[self.code(name)]
