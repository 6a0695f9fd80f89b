"""Batches from the replay store. What a batch holds depends only on (seed, step) and on the store's content."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.draw import EpisodeDraw, Limits
from data.layout import EPISODE, WORDS
from data.segment import Segment
from data.store import ReplayStore
from data.types import Behaviour, DecisionBatch, Source, StepBatch, Success, UserError

_LENGTH, _DECISIONS, _SUCCESS, _BEHAVIOUR = map(EPISODE.index, ("length", "decisions", "success", "behaviour"))
_YES, _UNKNOWN = WORDS["success"].index(Success.YES), WORDS["behaviour"].index(Behaviour.UNKNOWN)
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


class DecisionSampler:
    """Windows of decisions for a learner.

    Each source gets its share of the windows by largest remainder. A window's episode is drawn among the usable ones
    (behaviour known, within the limits; ``data.draw``), its first decision uniformly among those that leave room for
    ``decisions`` of them. Call ``store.refresh()`` to draw from what others appended meanwhile.
    """

    def __init__(
        self, store: ReplayStore, config: ReplayConfig, *, chunk: int, seed: int, priority_exponent: float = 0.0
    ) -> None:
        """``chunk``: actions per decision ``k`` that the learner's policy has."""
        self.store, self.config, self.chunk, self.seed = store, config, chunk, seed
        self.episodes = EpisodeDraw(store, config.limits(), _has_decisions, priority_exponent=priority_exponent)

    def sample(
        self, step: int, *, version: int | None = None, now: float | None = None, rank: int = 0, world_size: int = 1
    ) -> DecisionBatch:
        """Rank ``rank``'s share of batch number ``step``; all shares concatenated are the batch of one process.

        ``version`` is that of the policy in training, ``now`` the time in s since 1970: what ``max_lag`` and
        ``max_age`` are measured against. Raises ``UserError`` when a source with a weight has nothing to draw.
        """
        episodes, starts = self.plan(step, version=version, now=now)
        first, last = (len(episodes) * r // world_size for r in (rank, rank + 1))
        return self._read(episodes[first:last], starts[first:last])

    def plan(
        self, step: int, *, version: int | None = None, now: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Episode and first decision of every window of the global batch, in random order."""
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
        return episodes, starts

    def _read(self, episodes: np.ndarray, starts: np.ndarray) -> DecisionBatch:
        spec, d, k = self.store.spec, self.config.decisions, self.chunk
        b, size, a = len(episodes), spec.image_size, spec.action_dim
        frames = {camera: np.empty((b, d, size, size, 3), np.uint8) for camera in spec.cameras}
        final_frames = {camera: np.empty((b, size, size, 3), np.uint8) for camera in spec.cameras}
        proprio, final_proprio = np.zeros((b, d, spec.proprio_dim), np.float32), np.zeros((b, spec.proprio_dim), "f4")
        token, log_prob = np.zeros((b, d, k, a), np.int64), np.zeros((b, d, k, a), np.float32)
        token_mask, mask, terminated = np.zeros((b, d, k), bool), np.zeros((b, d), bool), np.zeros(b, bool)
        reward, discount, uncertainty = (np.zeros((b, d), np.float32) for _ in range(3))
        version = np.zeros((b, d), np.int64)

        for j, (episode, start) in enumerate(zip(episodes, starts, strict=True)):
            segment, row = self.store.locate(episode)
            columns = segment.columns
            begin, length = segment.table[row, :2].tolist()
            end = begin + length
            decided = np.flatnonzero(columns["decision"][begin:end]) + begin
            borders = np.append(decided[start : start + d + 1], end)[: d + 1]
            rows, following, n = borders[:-1], borders[-1], len(borders) - 1
            span = np.diff(borders)
            inside = np.arange(k) < span[:, None]
            chunk = np.minimum(rows[:, None] + np.arange(k), end)

            mask[j, :n], token_mask[j, :n] = True, inside
            token[j, :n] = np.where(inside[..., None], columns["action_token"][chunk], 0)
            log_prob[j, :n] = np.where(inside[..., None], columns["log_prob"][chunk], 0)
            proprio[j, :n], final_proprio[j] = columns["proprio"][rows], columns["proprio"][following]
            version[j, :n] = columns["policy_version"][rows]
            discount[j, :n] = self.config.discount**span
            steps = np.arange(rows[0], following)
            age = steps - np.repeat(rows, span)
            first = rows - rows[0]
            reward[j, :n] = np.add.reduceat(columns["reward"][steps] * self.config.discount**age, first)
            uncertainty[j, :n] = np.add.reduceat(columns["uncertainty"][steps], first) / span
            terminated[j] = columns["terminated"][following - 1]
            for camera in spec.cameras:
                source_frames = columns[f"rgb_{camera}"]
                source_frames.take(rows, axis=0, out=frames[camera][j, :n], mode="clip")
                frames[camera][j, n:] = 0
                final_frames[camera][j] = source_frames[following]

        table = self.store.episodes
        return DecisionBatch(
            frames=_tensors(frames), proprio=torch.from_numpy(proprio),
            instruction=table.instruction[episodes].tolist(), token=torch.from_numpy(token),
            log_prob=torch.from_numpy(log_prob), token_mask=torch.from_numpy(token_mask), mask=torch.from_numpy(mask),
            reward=torch.from_numpy(reward), discount=torch.from_numpy(discount),
            terminated=torch.from_numpy(terminated), final_frames=_tensors(final_frames),
            final_proprio=torch.from_numpy(final_proprio), policy_version=torch.from_numpy(version),
            uncertainty=torch.from_numpy(uncertainty), source=[Source(name) for name in table.source[episodes]],
            cloned=torch.from_numpy(table.behaviour[episodes] == Behaviour.CLONED.value),
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
        return self._read(*self.plan(step, batch, version=version, now=now))

    def plan(
        self, step: int, batch: int, *, version: int | None = None, now: float | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Episode and position of every window."""
        self.episodes.update(version=version, now=now)
        rng = _generator(self.seed, step, _STEP_STREAM)
        drawn = []
        for source, windows in shares(self.sources, batch).items():
            if not self.episodes.any(source):
                raise UserError(f"the replay store {self.store.path} has no {source.value} episodes, but sources."
                                f"{source.value}={self.sources[source.value]}; add some, or set it to 0")
            drawn.append(self.episodes.draw(rng, source, windows))
        episodes = np.concatenate(drawn)
        positions = self._positions(self.store.episodes.rows(0, len(self.store.episodes)), episodes)
        return episodes, rng.integers(positions)

    def _positions(self, table: np.ndarray, rows: np.ndarray | slice = _ALL) -> np.ndarray:
        """How many positions an episode has."""
        return np.maximum(table[rows, _LENGTH] - self.horizon, 0) + 1

    def _read(self, episodes: np.ndarray, positions: np.ndarray) -> StepBatch:
        spec, table = self.store.spec, self.store.episodes
        s, b, size = self.context + self.horizon - 1, len(episodes), spec.image_size
        frames = {camera: np.empty((b, s + 1, size, size, 3), np.uint8) for camera in spec.cameras}
        proprio, action = np.empty((b, s + 1, spec.proprio_dim), "f4"), np.zeros((b, s, spec.action_dim), "f4")
        mask, done = np.zeros((b, s), bool), np.zeros((b, s + 1), bool)
        for j, (episode, position) in enumerate(zip(episodes, positions, strict=True)):
            segment, row = self.store.locate(episode)
            start, length = segment.starts[row], segment.lengths[row]
            steps = position - (self.context - 1) + np.arange(s + 1)  # counted from the episode's beginning
            real = (steps[:-1] >= 0) & (steps[:-1] < length)
            seen = np.clip(steps, 0, length)
            rows = start + seen
            mask[j], action[j, real] = real, segment.columns["action"][rows[:-1][real]]
            proprio[j] = segment.columns["proprio"][rows]
            done[j] = (seen == length) & _ends_in_success(segment, row)
            for camera in spec.cameras:
                segment.columns[f"rgb_{camera}"].take(rows, axis=0, out=frames[camera][j], mode="clip")
        return StepBatch(
            frames=_tensors(frames), proprio=torch.from_numpy(proprio), action=torch.from_numpy(action),
            mask=torch.from_numpy(mask), instruction=table.instruction[episodes].tolist(),
            source=[Source(name) for name in table.source[episodes]], success_frame=torch.from_numpy(done),
            success_known=torch.from_numpy(table.success[episodes] != Success.UNKNOWN.value),
        )


def _has_decisions(table: np.ndarray) -> np.ndarray:
    return (table[:, _BEHAVIOUR] != _UNKNOWN) & (table[:, _DECISIONS] > 0)


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
    why = "within replay.max_lag and replay.max_age" if known.any() else "with a known behaviour"
    found = f"{own.sum()} episodes, none {why}" if own.any() else "no episodes"
    return (f"replay.mix.{source.value}={weight}, but the replay store {store.path} has {found} of source "
            f"{source.value}; add some, or type replay.mix.{source.value}=0")


def _ends_in_success(segment: Segment, row: int) -> bool:
    last = segment.starts[row] + segment.lengths[row] - 1
    return segment.table[row, _SUCCESS] == _YES and bool(segment.columns["terminated"][last])


def _generator(seed: int, step: int, stream: int) -> np.random.Generator:
    # The counter's top word keeps the streams of two samplers with one seed apart.
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, stream]))


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
