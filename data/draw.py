"""Which episodes a sampler draws: by source, within it by task, within that by priority, none that is too stale.

The tables follow the store: an episode is admitted once and expires once, so a draw costs the same in a store of a
million episodes as in a small one. What is drawn depends only on the store's content and on the generator.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from data.episodes import Episodes
from data.growing import Growing
from data.layout import WORDS
from data.store import ReplayStore
from data.sum_tree import SumTree
from data.types import NOT_OURS, Behaviour, Source, Success, UserError

TASK_WEIGHTS = ("uniform", "failures")
RECENT = 100
"""Episodes of a task whose failures count (arXiv 2603.18464)."""

_SIM, _LOGGED = WORDS["source"].index(Source.SIM), WORDS["behaviour"].index(Behaviour.LOGGED)
_NO = WORDS["success"].index(Success.NO)
_OUTCOME_UNKNOWN = WORDS["success"].index(Success.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may be drawn."""

    capacity: Mapping[str, int | None] = field(default_factory=dict)
    """For a source, how many of its newest usable episodes; all where it is not named or None."""
    max_lag: int | None = None
    """Largest number of gradient updates since an episode's policy acted. What no policy of ours acted has no lag."""
    max_age: float | None = None
    """Largest time since an episode was committed, in seconds."""
    task_weights: str = "uniform"
    """``uniform`` over episodes, or ``failures``: tasks in proportion to 1 + the percentage of failures among the
    policy's newest simulated episodes, so that solved tasks do not crowd out the others."""

    def __post_init__(self) -> None:
        if self.task_weights not in TASK_WEIGHTS:
            raise UserError(f"replay.task_weights: expected {' or '.join(TASK_WEIGHTS)}, got {self.task_weights!r}")
        for name in ("max_lag", "max_age"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"replay.{name}: expected 0 or more, or null, got {value}")


def task_weight(failures: Collection[bool]) -> float:
    """1 + the percentage of failures, after one more success and one more failure; 51 where nothing is known."""
    return 1 + RECENT * (sum(failures) + 1) / (len(failures) + 2)


def own_failures(episodes: Episodes) -> dict[str, deque[bool]]:
    """For each task, whether the policy failed in each of its newest ``RECENT`` simulated episodes."""
    failures: dict[str, deque[bool]] = defaultdict(lambda: deque(maxlen=RECENT))
    own = np.flatnonzero(_own(episodes, slice(None)))
    failed = episodes.code("success")[own] == _NO
    for task, failure in zip(episodes.words("task", own), failed.tolist(), strict=True):
        failures[task].append(failure)
    return failures


def _own(episodes: Episodes, rows: slice) -> np.ndarray:
    """Which of ``rows`` a policy of ours played in simulation, with a known outcome."""
    source, behaviour, version, outcome = (
        episodes.code(name)[rows] for name in ("source", "behaviour", "policy_version", "success"))
    return (source == _SIM) & (behaviour == _LOGGED) & (version != NOT_OURS) & (outcome != _OUTCOME_UNKNOWN)


class EpisodeDraw:
    """Draws episodes of one store for one sampler."""

    def __init__(
        self, store: ReplayStore, limits: Limits, weigh: Callable[[np.ndarray], np.ndarray], *,
        priority_exponent: float = 0.0,
    ) -> None:
        """``weigh(table)`` gives the weight of each row of an episode table; 0 is never drawn."""
        self.store, self.limits, self.weigh, self.exponent = store, limits, weigh, priority_exponent
        self._reset(store.rebuilt)

    def _reset(self, rebuilt: int) -> None:
        self._rebuilt, self._seen, self._version = rebuilt, 0, 0
        self._largest = 1.0
        self._strata: dict[int, dict[int, _Stratum]] = {code: {} for code in range(len(Source))}
        self._place = Growing((3,))
        """Source, task and leaf of every episode; leaf -1 where it was never drawable."""
        self._base, self._priority = Growing(dtype=np.float64), Growing(dtype=np.float64)
        self._queue = {code: Growing() for code in range(len(Source))}
        """Drawable episodes of a source in order of commit."""
        self._first = dict.fromkeys(range(len(Source)), 0)
        """How many of the queue have expired by capacity or age."""
        self._by_version: dict[int, list[np.ndarray]] = defaultdict(list)
        self._versions: list[int] = []
        """Their keys, a heap."""
        self._failures: dict[int, deque[bool]] = defaultdict(lambda: deque(maxlen=RECENT))

    def update(self, *, version: int | None = None, now: float | None = None) -> None:
        """Admit what the store shows by now, and expire what is too stale for policy ``version`` at time ``now``.

        Raises ``UserError`` when a limit is set and what it is measured against is not given.
        """
        if self.limits.max_lag is not None and version is None:
            raise UserError("replay.max_lag needs the version of the policy that is trained; sample(..., version=)")
        if self.limits.max_age is not None and now is None:
            raise UserError("replay.max_age needs the time; sample(..., now=time.time())")
        if self._rebuilt != self.store.rebuilt or (version or 0) < self._version:
            self._reset(self.store.rebuilt)
        episodes = self.store.episodes
        if len(episodes) > self._seen:
            self._admit(episodes)
        self._expire(version or 0, now)

    def any(self, source: Source) -> bool:
        """Whether an episode of a source may be drawn now."""
        return any(stratum.tree.total > 0 for stratum in self._strata[WORDS["source"].index(source)].values())

    def draw(self, rng: np.random.Generator, source: Source, windows: int) -> np.ndarray:
        """Indices of ``windows`` episodes, with replacement; there must be ``any``."""
        strata = self._strata[WORDS["source"].index(source)]
        if len(strata) == 1:
            (stratum,) = strata.values()
            return stratum.episodes.values[stratum.tree.find(rng.random(windows) * stratum.tree.total)]
        totals = np.array([stratum.tree.total for stratum in strata.values()])
        weights = totals
        if self.limits.task_weights == "failures":
            weights = np.array([task_weight(self._failures.get(task, ())) for task in strata]) * (totals > 0)
        ends = weights.cumsum()
        which = np.minimum(np.searchsorted(ends, rng.random(windows) * ends[-1], side="right"), len(ends) - 1)
        places = rng.random(windows)
        drawn = np.empty(windows, np.int64)
        for number, stratum in enumerate(strata.values()):
            mine = which == number
            if mine.any():
                drawn[mine] = stratum.episodes.values[stratum.tree.find(places[mine] * totals[number])]
        return drawn

    def set_priority(self, episodes: np.ndarray, priorities: np.ndarray) -> None:
        """Draw these episodes in proportion to ``priority ** priority_exponent`` from now on; new ones get the largest.

        Each at most once. An episode that has expired stays so.
        """
        self._priority.values[episodes] = priorities
        self._largest = max(self._largest, float(np.max(priorities, initial=0)))
        for source, strata in self._strata.items():
            for task, stratum in strata.items():
                own = episodes[(self._place.values[episodes, 0] == source) & (self._place.values[episodes, 1] == task)]
                leaves = self._place.values[own, 2]
                alive = stratum.tree.weights[leaves] > 0
                if alive.any():
                    stratum.tree.set(leaves[alive], self._weight(own[alive]))

    def _weight(self, episodes: np.ndarray) -> np.ndarray:
        base = self._base.values[episodes]
        return base * self._priority.values[episodes] ** self.exponent if self.exponent else base

    def _admit(self, episodes: Episodes) -> None:
        first, last = self._seen, len(episodes)
        self._seen = last
        source, task, version = (episodes.code(name)[first:last] for name in ("source", "task", "policy_version"))
        if self.limits.task_weights == "uniform":  # then one stratum holds all
            task = np.zeros_like(task)
        base = np.asarray(self.weigh(episodes.rows(first, last)), float)
        place = np.stack([source, task, np.full(last - first, -1)], axis=1)
        self._base.append(base)
        self._priority.append(np.full(last - first, self._largest))
        new = np.arange(first, last)
        drawable = base > 0
        for code in np.unique(source[drawable]).tolist():
            self._queue[code].append(new[drawable & (source == code)])
            tasks, seen_at = np.unique(task[drawable & (source == code)], return_index=True)
            # In order of appearance, which a sampler that saw the store grow and one that opens it now agree on.
            for task_code in tasks[seen_at.argsort()].tolist():
                mine = drawable & (source == code) & (task == task_code)
                stratum = self._strata[code].setdefault(task_code, _Stratum())
                place[mine, 2] = len(stratum.tree) + np.arange(mine.sum())
                stratum.episodes.append(new[mine])
                stratum.tree.append(self._weight(new[mine]))
        self._place.append(place)
        if self.limits.max_lag is not None:
            ours = np.flatnonzero(drawable & (version != NOT_OURS))
            ours = ours[np.argsort(version[ours], kind="stable")]
            values, begins = np.unique(version[ours], return_index=True)
            for value, group in zip(values.tolist(), np.split(new[ours], begins[1:]), strict=True):
                if value not in self._by_version:
                    heapq.heappush(self._versions, value)
                self._by_version[value].append(group)
        if self.limits.task_weights == "failures":
            own = _own(episodes, slice(first, last))
            failed = episodes.code("success")[first:last] == _NO
            for task_code, failure in zip(task[own].tolist(), failed[own].tolist(), strict=True):
                self._failures[task_code].append(failure)

    def _expire(self, version: int, now: float | None) -> None:
        times = self.store.episodes.code("commit_time")
        for code, queue in self._queue.items():
            first = self._first[code]
            capacity = self.limits.capacity.get(WORDS["source"][code])
            last = first if capacity is None else max(first, len(queue) - capacity)
            if self.limits.max_age is not None and now is not None:
                oldest = int((now - self.limits.max_age) * 1e9)
                last = max(last, first + int(np.searchsorted(times[queue.values[first:]], oldest)))
            self._silence(queue.values[first:last])
            self._first[code] = last
        if self.limits.max_lag is not None and version > self._version:
            while self._versions and version - self._versions[0] > self.limits.max_lag:
                self._silence(np.concatenate(self._by_version.pop(heapq.heappop(self._versions))))
        self._version = version

    def _silence(self, episodes: np.ndarray) -> None:
        if len(episodes) == 0:
            return
        source, task, leaf = self._place.values[episodes].T
        for code, task_code in np.unique(np.stack([source, task], axis=1), axis=0).tolist():
            mine = (source == code) & (task == task_code)
            self._strata[code][task_code].tree.set(leaf[mine], 0.0)


class _Stratum:
    """Drawable episodes of one source (and task, where tasks are weighed), and their weights."""

    def __init__(self) -> None:
        self.episodes = Growing()
        self.tree = SumTree()
