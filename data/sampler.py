"""Batches from the replay store. What a batch holds depends only on (seed, step) and on the store's content."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batches import DecisionBatch, StepBatch
from data.draw import EpisodeDraw, Limits
from data.episodes import Episodes
from data.layout import EPISODE, WORDS
from data.mapping import will_need
from data.outcome import steps_until_decided
from data.segment import Segment
from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Success, UserError

_LENGTH, _DECISIONS, _BEHAVIOUR, _SUCCESS = map(EPISODE.index, ("length", "decisions", "behaviour", "success"))
_CLONED, _UNKNOWN = map(WORDS["behaviour"].index, (Behaviour.CLONED, Behaviour.UNKNOWN))
_OUTCOME_UNKNOWN = WORDS["success"].index(Success.UNKNOWN)
_SMALL = ("proprio", "action_token", "log_prob", "reward", "terminated", "policy_version", "uncertainty")
_SOURCES = list(Source)
_ALL = slice(None)
_DECISION_STREAM, _STEP_STREAM = 1, 2


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """What a learner reads from the store."""

    windows: int
    """Windows in one global batch."""
    decisions: int
    """Most decisions in a window, ``d``."""
    discount: float
    """Per control step."""
    mix: Mapping[str, float]
    """Weight of each source: sim, real, imagined."""
    capacity: Mapping[str, int | None]
    """For each source, how many of its newest usable episodes may be drawn; None is all of them."""
    max_lag: int | None = None
    """See ``Limits``, as the next two."""
    max_age: float | None = None
    task_weights: str = "uniform"
    outcome_labels: bool = False
    """Also draw episodes whose success only a success model said (``data.outcome_labels``)."""

    def __post_init__(self) -> None:
        for name in ("windows", "decisions"):
            if getattr(self, name) < 1:
                raise UserError(f"replay.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.discount <= 1:
            raise UserError(f"replay.discount: expected a number in (0, 1], got {self.discount}")
        check_weights("replay.mix", self.mix)
        check_sources("replay.capacity", self.capacity)
        for source in Source:
            if source.value not in self.mix or source.value not in self.capacity:
                raise UserError(f"replay.mix and replay.capacity: expected a value for {source.value}, got none; "
                                f"type +replay.mix.{source.value}=0 +replay.capacity.{source.value}=null")
            limit = self.capacity[source.value]
            if limit is not None and limit < 1:
                raise UserError(f"replay.capacity.{source.value}: expected at least 1 or null, got {limit}")
        self.limits()

    def limits(self) -> Limits:
        """What may be drawn."""
        return Limits(capacity=self.capacity, max_lag=self.max_lag, max_age=self.max_age,
                      task_weights=self.task_weights)


class Plan(NamedTuple):
    """Windows that are drawn but not yet read, and the tables they were drawn from, whatever the store shows later."""

    episodes: np.ndarray
    """``[windows]``."""
    starts: np.ndarray
    """First decision, or first step that is predicted, of each, counted from the episode's beginning."""
    table: Episodes
    segments: Sequence[Segment]

    def share(self, rank: int, world_size: int) -> Plan:
        """Rank ``rank``'s windows; all shares concatenated are the plan."""
        first, last = (len(self.episodes) * r // world_size for r in (rank, rank + 1))
        return self._replace(episodes=self.episodes[first:last], starts=self.starts[first:last])

    def places(self, extra: np.ndarray) -> Iterator[tuple[Segment, int, int, int]]:
        """Segment, first row and length of each window's episode, with what ``extra`` says of it."""
        columns = (self.table.code(name)[self.episodes].tolist() for name in ("start", "length"))
        place = self.table.place[self.episodes].tolist()
        for where, start, length, value in zip(place, *columns, extra.tolist(), strict=True):
            yield self.segments[where], start, length, value

    def advise(self, cameras: Sequence[str], context: int, rows: int) -> None:
        """Have pictures fetched from disk while something else is done: ``rows`` of each window, some before it."""
        for segment, begin, length, start in self.places(np.maximum(self.starts - context, 0)):
            for camera in cameras:
                column = segment.columns[f"rgb_{camera}"]
                if isinstance(column, np.ndarray):
                    will_need(column[begin + start : begin + min(start + rows, length + 1)])


class DecisionSampler:
    """Windows of decisions for a learner.

    Each source gets its share of the windows by largest remainder. A window's episode is drawn among the usable ones
    (behaviour and success known, within the limits; ``data.draw``), its first decision uniformly among those that leave
    room for ``decisions`` of them. An episode of unknown success has no known reward: the zeros stored for it would say
    that it failed. Call ``store.refresh()`` to draw from what others appended meanwhile.
    """

    def __init__(
        self, store: ReplayStore, config: ReplayConfig, *, chunk: int, seed: int, priority_exponent: float = 0.0
    ) -> None:
        """``chunk``: actions per decision ``k`` that the learner's policy has."""
        self.store = store.with_outcome_labels() if config.outcome_labels else store
        self.config, self.chunk, self.seed = config, chunk, seed
        self.episodes = EpisodeDraw(self.store, config.limits(), _has_decisions, priority_exponent=priority_exponent)

    def sample(
        self, step: int, *, version: int | None = None, now: float | None = None, rank: int = 0, world_size: int = 1
    ) -> DecisionBatch:
        """Rank ``rank``'s share of batch number ``step``; all shares concatenated are the batch of one process.

        ``version`` is that of the policy in training, ``now`` the time in s since 1970: what ``max_lag`` and
        ``max_age`` are measured against. Raises ``UserError`` when a source with a weight has nothing to draw.
        """
        return self.read(self.plan(step, version=version, now=now, rank=rank, world_size=world_size))

    def plan(
        self, step: int, *, version: int | None = None, now: float | None = None, rank: int = 0, world_size: int = 1
    ) -> Plan:
        """Choose the windows of ``sample``."""
        if self.config.outcome_labels:  # the caller refreshes the store that it gave, this is another reader of it
            self.store.refresh()
        config, table = self.config, self.store.episodes
        self.episodes.update(version=version, now=now)
        rng = _generator(self.seed, step, _DECISION_STREAM)
        drawn = []
        for source, windows in shares(config.mix, config.windows).items():
            if not self.episodes.any(source):
                raise UserError(_nothing_to_draw(self.store, source, config.mix[source.value]))
            drawn.append(self.episodes.draw(rng, source, windows))
        episodes = rng.permutation(np.concatenate(drawn))  # so that every rank gets every source
        starts = rng.integers(np.maximum(0, table.code("decisions")[episodes] - config.decisions) + 1)
        return Plan(episodes, starts, table, self.store.segments).share(rank, world_size)

    def buffers(self, *, pin: bool) -> dict[str, Tensor]:
        """Memory that ``read`` can put the pictures of a batch into."""
        config, spec = self.config, self.store.spec
        return _buffers(spec, {"": (config.windows, config.decisions), "final_": (config.windows,)}, pin=pin)

    def advise(self, plan: Plan) -> None:
        """Have the pictures of planned windows fetched from disk while something else is done.

        Where the decisions lie is not read for this: as many steps as decisions are asked for, from the beginning.
        """
        plan.advise(self.store.spec.cameras, 0, self.config.decisions + 1)

    def read(self, plan: Plan, into: Mapping[str, Tensor] | None = None) -> DecisionBatch:
        """The planned windows: pictures copied one by one, the small columns of all cut into decisions at once."""
        spec, d, k = self.store.spec, self.config.decisions, self.chunk
        episodes, table, cameras = plan.episodes, plan.table, spec.cameras
        b = len(episodes)
        frames = _pictures(spec, (b, d), into, "")
        final_frames = _pictures(spec, (b,), into, "final_")
        packed: dict[str, list[np.ndarray]] = {name: [] for name in _SMALL}
        borders_of, firsts = [], np.empty(b, np.int64)
        packed_rows = 0
        for j, (segment, begin, length, start) in enumerate(plan.places(plan.starts)):
            columns = segment.columns
            decided = columns["decision"][begin : begin + length].nonzero()[0][start : start + d + 1]
            n = min(len(decided), d)
            borders = np.empty(n + 1, np.int64)
            borders[:n] = decided[:n]
            borders[n] = decided[d] if len(decided) > d else decided[-1] + steps_until_decided(
                columns["terminated"][begin + decided[-1] : begin + length])
            first, following = begin + int(borders[0]), begin + int(borders[n])
            rows = slice(first, begin + int(borders[n - 1]) + 1)
            contiguous = rows.stop - rows.start == n
            for camera in cameras:
                source, target = columns[f"rgb_{camera}"], frames[camera]
                if contiguous:
                    target[j, :n] = source[rows]
                else:
                    source.take(borders[:-1] + begin, axis=0, out=target[j, :n], mode="clip")
                target[j, n:] = 0
                final_frames[camera][j] = source[following]
            for name, pieces in packed.items():
                pieces.append(columns[name][first : following + 1])
            borders_of.append(borders - borders[0])
            firsts[j], packed_rows = packed_rows, packed_rows + following + 1 - first

        small = {name: np.concatenate(pieces) for name, pieces in packed.items()}
        counts = np.array([len(borders) - 1 for borders in borders_of])
        window = np.repeat(np.arange(b), counts)
        at = window, np.arange(len(window)) - np.repeat(counts.cumsum() - counts, counts)
        begins = np.concatenate([borders[:-1] for borders in borders_of]) + firsts[window]
        ends = np.concatenate([borders[1:] for borders in borders_of]) + firsts[window]
        final = np.append(firsts[1:], packed_rows) - 1
        span, gamma = ends - begins, self.config.discount
        inside = np.arange(k) < span[:, None]
        chunk = np.minimum(begins[:, None] + np.arange(k), packed_rows - 1)
        # Steps since their decision; the observation after the last one belongs to no decision.
        age = np.arange(packed_rows) - np.repeat(begins, np.diff(begins, append=packed_rows))
        belongs = np.ones(packed_rows, np.float32)
        belongs[final] = 0
        reward = np.add.reduceat(small["reward"] * (gamma**age).astype(np.float32) * belongs, begins)
        uncertainty = np.add.reduceat(small["uncertainty"] * belongs, begins) / span

        def padded(values: np.ndarray, dtype: type = np.float32) -> Tensor:
            whole = np.zeros((b, d, *values.shape[1:]), dtype)
            whole[at] = values
            return torch.from_numpy(whole)

        return DecisionBatch(
            frames=_tensors(frames), proprio=padded(small["proprio"][begins]),
            instruction=table.words("instruction", episodes),
            token=padded(np.where(inside[..., None], small["action_token"][chunk], 0), np.int64),
            log_prob=padded(np.where(inside[..., None], small["log_prob"][chunk], 0)),
            token_mask=padded(inside, bool), mask=padded(np.ones(len(window)), bool), reward=padded(reward),
            discount=padded(gamma**span), terminated=torch.from_numpy(small["terminated"][final - 1]),
            final_frames=_tensors(final_frames), final_proprio=torch.from_numpy(small["proprio"][final]),
            policy_version=padded(small["policy_version"][begins], np.int64), uncertainty=padded(uncertainty),
            source=[_SOURCES[code] for code in table.code("source")[episodes].tolist()],
            cloned=torch.from_numpy(table.code("behaviour")[episodes] == _CLONED),
        )


class StepSampler:
    """Windows of control steps for a world model, of episodes of any behaviour.

    Each source gets its share of a batch by largest remainder; within a source, every position that has ``horizon``
    steps after it is equally likely (an episode shorter than that has one position, its beginning).
    """

    def __init__(
        self, store: ReplayStore, *, sources: Mapping[str, float], context: int, horizon: int, seed: int,
        limits: Limits | None = None, priority_exponent: float = 0.0,
    ) -> None:
        """``sources``: weight of each source; one left out counts 0. ``context``, ``horizon``: see ``StepBatch``."""
        check_weights("sources", sources)
        if context < 1 or horizon < 1:
            raise UserError(f"context and horizon: expected at least 1 frame each, got {context} and {horizon}")
        self.store, self.sources, self.context, self.horizon, self.seed = store, sources, context, horizon, seed
        self.episodes = EpisodeDraw(store, limits or Limits(), self._positions, priority_exponent=priority_exponent)

    def sample(
        self, step: int, batch: int, *, version: int | None = None, now: float | None = None
    ) -> StepBatch:
        """Batch number ``step`` of ``batch`` windows. Raises ``UserError`` when a source with a weight is empty."""
        return self.read(self.plan(step, batch, version=version, now=now))

    def plan(
        self, step: int, batch: int, *, version: int | None = None, now: float | None = None
    ) -> Plan:
        """Choose the windows of ``sample``."""
        self.episodes.update(version=version, now=now)
        rng = _generator(self.seed, step, _STEP_STREAM)
        drawn = []
        for source, windows in shares(self.sources, batch).items():
            if not self.episodes.any(source):
                raise UserError(f"the replay store {self.store.path} has no {source.value} episodes, but sources."
                                f"{source.value}={self.sources[source.value]}; add some, or set it to 0")
            drawn.append(self.episodes.draw(rng, source, windows))
        episodes = np.concatenate(drawn)
        table = self.store.episodes
        positions = self._positions(table.rows(0, len(table)), episodes)
        return Plan(episodes, rng.integers(positions), table, self.store.segments)

    def buffers(self, batch: int, *, pin: bool) -> dict[str, Tensor]:
        """Memory that ``read`` can put the pictures of a batch into."""
        return _buffers(self.store.spec, {"": (batch, self.context + self.horizon)}, pin=pin)

    def advise(self, plan: Plan) -> None:
        """Have the pictures of planned windows fetched from disk while something else is done."""
        plan.advise(self.store.spec.cameras, self.context - 1, self.context + self.horizon)

    def _positions(self, table: np.ndarray, rows: np.ndarray | slice = _ALL) -> np.ndarray:
        """How many positions an episode has."""
        return np.maximum(table[rows, _LENGTH] - self.horizon, 0) + 1

    def read(self, plan: Plan, into: Mapping[str, Tensor] | None = None) -> StepBatch:
        """The planned windows."""
        spec, table, episodes = self.store.spec, plan.table, plan.episodes
        s, b = self.context + self.horizon - 1, len(episodes)
        frames = _pictures(spec, (b, s + 1), into, "")
        proprio, action = np.empty((b, s + 1, spec.proprio_dim), "f4"), np.zeros((b, s, spec.action_dim), "f4")
        decided = np.empty(b, np.int64)
        lengths = table.length[episodes]
        # Counted from the episode's beginning; what lies outside it repeats the nearest observation.
        steps = (plan.starts - (self.context - 1))[:, None] + np.arange(s + 1)
        seen = np.clip(steps, 0, lengths[:, None])
        mask = (steps[:, :-1] >= 0) & (steps[:, :-1] < lengths[:, None])
        whole = mask.all(axis=1)
        for j, (segment, begin, length, step) in enumerate(plan.places(steps[:, 0])):
            columns = segment.columns
            decided[j] = steps_until_decided(columns["terminated"][begin : begin + length])
            if whole[j]:
                rows = slice(begin + step, begin + step + s + 1)
                proprio[j], action[j] = columns["proprio"][rows], columns["action"][rows.start : rows.stop - 1]
                for camera in spec.cameras:
                    frames[camera][j] = columns[f"rgb_{camera}"][rows]
                continue
            places = begin + seen[j]
            action[j, mask[j]] = columns["action"][places[:-1][mask[j]]]
            proprio[j] = columns["proprio"][places]
            for camera in spec.cameras:
                columns[f"rgb_{camera}"].take(places, axis=0, out=frames[camera][j], mode="clip")
        return StepBatch(
            frames=_tensors(frames), proprio=torch.from_numpy(proprio), action=torch.from_numpy(action),
            mask=torch.from_numpy(mask), instruction=table.words("instruction", episodes),
            source=[_SOURCES[code] for code in table.code("source")[episodes].tolist()],
            aftermath=torch.from_numpy(mask & (steps[:, :-1] >= decided[:, None])),
        )


def _has_decisions(table: np.ndarray) -> np.ndarray:
    known = (table[:, _BEHAVIOUR] != _UNKNOWN) & (table[:, _SUCCESS] != _OUTCOME_UNKNOWN)
    return known & (table[:, _DECISIONS] > 0)


def has_outcomes(store: ReplayStore, source: Source) -> bool:
    """Whether any episode of a source says if it succeeded: without that, a policy cannot learn from its rewards."""
    episodes = store.episodes
    return bool(((episodes.source == source.value) & (episodes.success != Success.UNKNOWN.value)).any())


def shares(weights: Mapping[str, float], total: int) -> dict[Source, int]:
    """Split ``total`` among the sources with a weight, by largest remainder; a tie goes to the earlier ``Source``."""
    weighted = {source: weights[source.value] for source in Source if weights.get(source.value, 0) > 0}
    scale = total / sum(weighted.values())
    parts = {source: math.floor(weight * scale) for source, weight in weighted.items()}
    by_remainder = sorted(weighted, key=lambda source: parts[source] - weighted[source] * scale)
    for source in by_remainder[: total - sum(parts.values())]:
        parts[source] += 1
    return parts


def check_sources(name: str, values: Mapping[str, object]) -> None:
    """Raise ``UserError`` for a key that is no source."""
    for key in values:
        if key not in list(Source):
            close = difflib.get_close_matches(key, list(Source), n=1, cutoff=0)[0]
            raise UserError(f"{name}: expected sim, real or imagined, got {key!r}; did you mean {close}?")


def check_weights(name: str, weights: Mapping[str, float]) -> None:
    """Raise ``UserError`` unless the keys are sources, no weight is negative and one is positive."""
    check_sources(name, weights)
    for key, weight in weights.items():
        if not (weight >= 0 and math.isfinite(weight)):
            raise UserError(f"{name}.{key}: expected a weight of 0 or more, got {weight}")
    if sum(weights.values()) <= 0:
        raise UserError(f"{name}: expected a positive weight for at least one source, got {dict(weights)}")


def _nothing_to_draw(store: ReplayStore, source: Source, weight: float) -> str:
    own = store.episodes.source == source.value
    known = own & (store.episodes.behaviour != Behaviour.UNKNOWN.value)
    paid = known & (store.episodes.success != Success.UNKNOWN.value)
    why = ("within replay.max_lag and replay.max_age" if paid.any() else
           "with a known success" if known.any() else "with a known behaviour")
    found = f"{own.sum()} episodes, none {why}" if own.any() else "no episodes"
    return (f"replay.mix.{source.value}={weight}, but the replay store {store.path} has {found} of source "
            f"{source.value}; add some, or type replay.mix.{source.value}=0")


def _pictures(
    spec: Spec, shape: tuple[int, ...], into: Mapping[str, Tensor] | None, prefix: str
) -> dict[str, np.ndarray]:
    """Where a batch's frames go: new arrays, or those of an earlier batch."""
    whole = (*shape, spec.image_size, spec.image_size, 3)
    if into is None:
        return {camera: np.empty(whole, np.uint8) for camera in spec.cameras}
    return {camera: into[prefix + camera].numpy().reshape(-1)[: math.prod(whole)].reshape(whole)
            for camera in spec.cameras}


def _buffers(spec: Spec, shapes: Mapping[str, tuple[int, ...]], *, pin: bool) -> dict[str, Tensor]:
    return {prefix + camera: torch.empty((*shape, spec.image_size, spec.image_size, 3), dtype=torch.uint8,
                                         pin_memory=pin)
            for prefix, shape in shapes.items() for camera in spec.cameras}


def _generator(seed: int, step: int, stream: int) -> np.random.Generator:
    # The counter's top word keeps the streams of two samplers with one seed apart.
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, stream]))


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
