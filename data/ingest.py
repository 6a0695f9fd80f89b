"""Robot logs into the replay store: each episode decoded, scaled and committed on its own, once.

An episode of ``r`` rows becomes a trajectory of ``r - 1`` steps and ``r`` observations: no observation follows the
log's last action, so that action is left out. The logs hold no log-probabilities: behaviour is ``unknown``, no step
is a decision, until a cloned policy labels them (``ReplayStore.label_behaviour``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.budget import StoreConfig
from data.lerobot import LeRobotDataset, LeRobotEpisode, file_sha256, read_lerobot
from data.logs.trajectory import known_episodes, log_trajectory
from data.store import ReplayStore
from data.text import ranges
from data.types import Spec, Statistics, UserError


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How logs are read."""

    image_size: int
    """Frames become squares of this many pixels; the whole picture is kept, its aspect is not."""
    cameras: Mapping[str, str] | None
    """Camera in the store -> key in the log. None takes every camera, by the last part of its key."""
    embodiment: str | None
    """Name of the robot in the store; None takes the log's ``robot_type``."""
    clip: bool
    """Clip actions outside an existing store's range instead of refusing the set."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size: expected a number of pixels, got {self.image_size}")


@dataclass(kw_only=True)
class IngestReport:
    """What one run of ``ingest`` did. Episodes are the log's episode numbers."""

    source: str
    store: str
    version: str
    named: int
    """Episodes that the log's metadata name."""
    added: list[int] = field(default_factory=list)
    already: list[int] = field(default_factory=list)
    """In the store from an earlier run."""
    missing: list[int] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """File or episode -> reason."""
    steps: int = 0
    clipped: int = 0
    """Action values that were clipped."""
    success: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.source} (LeRobot {self.version}): {self.named} episodes named by its metadata",
                 f"  added {len(self.added)} episodes, {self.steps} steps, to {self.store}"]
        if self.added:
            lines.append("  success: " + ", ".join(f"{key} {count}" for key, count in sorted(self.success.items())))
        if self.already:
            lines.append(f"  {len(self.already)} were in the store already; nothing was added for them")
        if self.missing:
            lines.append(f"  {len(self.missing)} missing: {ranges(self.missing)}")
        if self.clipped:
            lines.append(f"  {self.clipped} action values clipped to the store's range")
        return lines + [f"  refused {name}: {reason}" for name, reason in sorted(self.refused.items())]


def ingest(
    source: str | Path, store: str | Path, config: IngestConfig, storage: StoreConfig | None = None
) -> IngestReport:
    """Add every whole episode of the LeRobot set ``source`` to the store, which is created when absent.

    A store made here takes its spec from the log and its action range from the episodes found, so nothing is
    clipped. May be repeated: an episode whose files and configuration are in the store already is skipped.

    Raises ``UserError`` when there is no set, nothing in it can be read, or it does not fit an existing store;
    nothing is committed then.
    """
    dataset = read_lerobot(source)
    cameras = _cameras(dataset, config)
    embodiment = config.embodiment or dataset.info.get("robot_type") or "unknown"
    path = Path(store)
    new = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    replay = None if new else ReplayStore.open(path, storage)
    if replay is not None:
        _check_fits(dataset, cameras, embodiment, replay, config)
    statistics = _statistics(dataset) if replay is None else replay.statistics
    clipped = _outside(dataset, statistics, config)

    report = IngestReport(source=str(source), store=str(store), version=dataset.version, named=dataset.report.named)
    config_hash = _hash(json.dumps({"image_size": config.image_size, "cameras": cameras, "clip": config.clip},
                                   sort_keys=True))
    known = known_episodes(replay)
    for episode in dataset.episodes():
        try:
            source_hash = _source_hash(dataset, episode, list(cameras.values()))
            if (source_hash, config_hash) in known:
                report.already.append(episode.index)
                continue
            frames = {name: dataset.frames(episode, key, config.image_size) for name, key in cameras.items()}
        except ValueError as reason:
            name, _, text = str(reason).partition(": ")
            dataset.refuse(name, text, index=episode.index)
            continue
        if replay is None:
            replay = _create(path, dataset, tuple(cameras), embodiment, statistics, config, storage)
        provenance = {"format": f"LeRobot {dataset.version}", "set": dataset.path.resolve().name,
                      "episode": episode.index, "source_sha256": source_hash, "config_sha256": config_hash,
                      "clock": "timestamp column, nominal: frame_index / fps",
                      "success_from": episode.success_from, "recorded": dict(episode.recorded)}
        trajectory = log_trajectory(
            frames=frames, proprio=episode.state, action=episode.action, shows_success=episode.shows_success[:-1],
            success=episode.success, timestamp=episode.timestamp, statistics=statistics, task=episode.task,
            instruction=episode.instruction, embodiment=embodiment, provenance=provenance)
        replay.append([trajectory])
        known.add((source_hash, config_hash))
        report.added.append(episode.index)
        report.steps += len(trajectory)
        report.clipped += clipped[episode.index]
        report.success[episode.success.value] = report.success.setdefault(episode.success.value, 0) + 1
    report.missing, report.refused = dataset.report.missing, dataset.report.refused
    if replay is not None:
        replay.close()
    if not report.added and not report.already:
        raise UserError(_nothing_read(dataset))
    return report


def _cameras(dataset: LeRobotDataset, config: IngestConfig) -> dict[str, str]:
    if config.cameras is None:
        cameras = {key.rsplit(".", 1)[-1]: key for key in dataset.cameras}
    else:
        cameras = dict(config.cameras)
    if not cameras:
        raise UserError(f"{dataset.path}: expected at least one camera, the set has none; it can not be ingested")
    for key in cameras.values():
        if key not in dataset.cameras:
            raise UserError(f"cameras: the set {dataset.path} has no {key!r}, but {', '.join(dataset.cameras)}; "
                            f"type cameras.<name>=<one of these>")
    return cameras


def _statistics(dataset: LeRobotDataset) -> Statistics:
    """Range of the actions and moments of the state over the episodes found."""
    episodes = list(dataset.episodes())
    if not episodes:
        raise UserError(_nothing_read(dataset))
    action = np.concatenate([episode.action for episode in episodes])
    state = np.concatenate([episode.state for episode in episodes]).astype(np.float64)
    std = state.std(0)
    return Statistics(action_low=action.min(0), action_high=action.max(0), proprio_mean=state.mean(0).astype("f4"),
                      proprio_std=np.where(std > 1e-6, std, 1).astype("f4"))


def _outside(dataset: LeRobotDataset, statistics: Statistics, config: IngestConfig) -> dict[int, int]:
    """Per episode, how many action values lie outside the range that the statistics map to [-1, 1]."""
    low, high = statistics.action_low, statistics.action_high
    slack = 1e-4 * (high - low) + 1e-6  # float32 rounding of a round trip
    counts = {}
    for episode in dataset.episodes():
        outside = (episode.action < low - slack) | (episode.action > high + slack)
        if outside.any() and not config.clip:
            row, column = np.argwhere(outside)[0]
            raise UserError(
                f"statistics do not match: {dataset.action_names[column]} is {episode.action[row, column]:.4g} in "
                f"episode {episode.index}, the store's range is [{low[column]:.4g}, {high[column]:.4g}]; ingest into "
                f"a new store=<folder>, or type clip=true")
        counts[episode.index] = int(outside.sum())
    return counts


def _check_fits(dataset: LeRobotDataset, cameras: Mapping[str, str], embodiment: str, store: ReplayStore,
                config: IngestConfig) -> None:
    spec = store.spec
    pairs = [
        ("embodiment", store.embodiment, embodiment, "embodiment=<name>"),
        ("cameras", sorted(spec.cameras), sorted(cameras), "cameras.<name>=<key in the log>"),
        ("image_size", spec.image_size, config.image_size, f"image_size={spec.image_size}"),
        ("proprio", list(spec.proprio_names), list(dataset.state_names), "store=<another folder>"),
        ("action", list(spec.action_names), list(dataset.action_names), "store=<another folder>"),
        # Nominal rates may be rounded (26.667 for 80 / 3).
        ("control_hz", round(spec.control_hz, 2), round(dataset.fps, 2), "store=<another folder>"),
    ]
    for name, expected, found, remedy in pairs:
        if expected != found:
            raise UserError(f"{name} does not match: the store {store.path} has {_short(expected)}, the log "
                            f"{_short(found)}; type {remedy}")


def _create(path: Path, dataset: LeRobotDataset, cameras: tuple[str, ...], embodiment: str, statistics: Statistics,
            config: IngestConfig, storage: StoreConfig | None) -> ReplayStore:
    spec = Spec(cameras=cameras, image_size=config.image_size, proprio_names=dataset.state_names,
                action_names=dataset.action_names, control_hz=dataset.fps)
    return ReplayStore.create(path, spec=spec, statistics=statistics, embodiment=embodiment,
                              config=storage)


def _source_hash(dataset: LeRobotDataset, episode: LeRobotEpisode, keys: list[str]) -> str:
    """Of the bytes of the episode's files. Raises ``ValueError`` naming a file that is missing."""
    hashes = []
    for file in dataset.files(episode.index, keys):
        if not file.exists():
            raise ValueError(f"{file.relative_to(dataset.path)}: missing")
        hashes.append(file_sha256(file))
    return _hash(" ".join([*hashes, str(episode.index)]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _nothing_read(dataset: LeRobotDataset) -> str:
    report = dataset.report
    first = next((f"; {name}: {reason}" for name, reason in report.refused.items()), "")
    return (f"{dataset.path}: expected at least one whole episode, found none of {report.named} "
            f"({len(report.missing)} missing, {len(report.refused)} refused{first}); copy the set again")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
