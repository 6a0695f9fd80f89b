"""What the crash test writes, and what it demands of whoever reads: episodes that are a pure function of their name."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache

import numpy as np

from data.budget import StoreConfig
from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Statistics, Success, Trajectory

SPEC = Spec(cameras=("front",), image_size=4, proprio_names=("x",), action_names=("u", "v"), control_hz=10.0)
STATISTICS = Statistics(action_low=-np.ones(2, np.float32), action_high=np.ones(2, np.float32),
                        proprio_mean=np.zeros(1, np.float32), proprio_std=np.ones(1, np.float32))
FLOOR = 40_000
"""Bytes of imagined episodes that eviction must leave: one or two segments."""

_SEGMENT, _SEALED = 2_500, 24_000


def config(*, durability: str = "process") -> StoreConfig:
    """About twenty rows per segment, and room for a dozen of them, so that sealing and evicting never stop."""
    return StoreConfig(segment_bytes=_SEGMENT, durability=durability, budget_bytes=2**20 + 13 * _SEALED,
                       floor_bytes={Source.REAL.value: float("inf"), Source.IMAGINED.value: FLOOR})


@lru_cache(4096)
def episode(writer: int, source: Source, number: int, first: int, count: int) -> Trajectory:
    """The ``number``-th episode that a writer appends of a source, in one append with ``count`` from ``first`` on."""
    rng = np.random.default_rng([writer, list(Source).index(source), number])
    steps = int(rng.integers(1, 13))
    last = np.arange(steps) == steps - 1
    return Trajectory(
        frames={"front": rng.integers(0, 256, (steps + 1, 4, 4, 3), np.uint8)},
        proprio=rng.normal(size=(steps + 1, 1)).astype(np.float32),
        action=rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        action_token=rng.integers(0, 11, (steps, 2)).astype(np.int16),
        log_prob=-rng.random((steps, 2)).astype(np.float32), decision=rng.random(steps) < 0.5,
        reward=rng.normal(size=steps).astype(np.float32), terminated=last, truncated=np.zeros(steps, bool),
        policy_version=rng.integers(0, 99, steps), uncertainty=rng.random(steps).astype(np.float32),
        timestamp=np.arange(steps + 1) / 10, source=source, task=f"task {number % 3}",
        instruction=f"do {number % 5}", success=Success.YES, behaviour=Behaviour.LOGGED, embodiment="crash",
        world_model_version=-1,
        provenance={"writer": writer, "source": source.value, "number": number, "first": first, "count": count})


def difference(found: Trajectory) -> str | None:
    """How an episode differs from what its provenance says it is."""
    said = found.provenance
    try:
        expected = episode(said["writer"], Source(said["source"]), said["number"], said["first"], said["count"])
    except (KeyError, TypeError, ValueError) as error:
        return f"an episode says it is {said}: {error!r}"
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if name == "frames":
            value, other = value["front"], other["front"]
        same = (value.tobytes() == other.tobytes() and value.dtype == other.dtype
                if isinstance(value, np.ndarray) else value == other)
        if not same:
            return f"{name} of {dict(said)} differs"
    return None


class Witness:
    """One reader's view of the store, from look to look: everything in it must be whole, in order, and stay."""

    def __init__(self, store: ReplayStore, seed: int) -> None:
        self.store, self.reads = store, 0
        self._rng = np.random.default_rng(seed)
        self._said: dict[tuple[str, int, bool], dict] = {}
        self._newest: dict[tuple[int, str], tuple[int, str]] = {}

    def look(self) -> list[str]:
        """What is wrong now: new episodes are compared bit for bit, and a few old ones again."""
        problems = []
        numbers: dict[tuple[int, str], list[tuple[int, str]]] = defaultdict(list)
        groups: dict[tuple[int, str, int, int], int] = defaultdict(int)
        again = set(self._rng.integers(0, max(1, len(self.store)), 3).tolist())
        for index in range(len(self.store)):
            segment, row = self.store.locate(index)
            key = (segment.name, row, segment.sealed)
            if key not in self._said or index in again:
                found = self.store.trajectory(index)
                self.reads += 1
                if problem := difference(found):
                    problems.append(f"torn: segment {segment.name}, episode {row}: {problem}")
                    continue
                self._said[key] = dict(found.provenance)
            said = self._said[key]
            numbers[said["writer"], said["source"]].append((said["number"], segment.name))
            groups[said["writer"], said["source"], said["first"], said["count"]] += 1
        problems += [f"torn: {found} episodes of the append {group}" for group, found in groups.items()
                     if found != group[3]]
        return problems + self._order(numbers)

    def _order(self, numbers: dict[tuple[int, str], list[tuple[int, str]]]) -> list[str]:
        problems = []
        gone = self.store.evicted()
        for who, seen in numbers.items():
            found = [number for number, _ in seen]
            evicting = any(segment in gone for _, segment in seen)  # some of what was evicted was seen before
            if found != list(range(found[0], found[0] + len(found))) and not evicting:
                problems.append(f"lost: of {who} there are the numbers {found}")
        for who, (number, segment) in self._newest.items():
            newest = max(numbers[who])[0] if numbers[who] else -1
            if newest < number and segment not in gone:
                problems.append(f"lost: {who} had number {number}, now its newest is {newest}")
        self._newest |= {who: max(seen) for who, seen in numbers.items() if seen}
        return problems
