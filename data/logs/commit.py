"""Logs of any format into the replay store: read, sampled, decoded and checked by processes, committed in order by one.

What is committed depends on the files and the mapping alone, not on the number of processes, and an episode that is
in the store already is not decoded again: a run that was killed is repeated and ends in the same store.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.budget import StoreConfig
from data.logs.mapping import LogMapping, to_yaml
from data.logs.readers import find_logs, open_log
from data.logs.sample import Rows, Sampled, dimension_names, sample
from data.logs.streams import LogEpisode, Refused, Stream
from data.logs.trajectory import known_episodes, log_trajectory
from data.store import ReplayStore
from data.types import Spec, Statistics, Trajectory, UserError


@dataclass(kw_only=True)
class LogReport:
    """What one run did."""

    store: str
    files: int = 0
    added: int = 0
    already: int = 0
    """In the store from an earlier run."""
    steps: int = 0
    masked: int = 0
    """Rows left out, for the reasons that follow."""
    success: dict[str, int] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    """Per file: what was masked or skipped, and why."""
    refused: dict[str, str] = field(default_factory=dict)
    """File or episode -> reason."""
    dry: bool = False

    def lines(self) -> list[str]:
        """For people."""
        would = "would add" if self.dry else "added"
        lines = [f"{self.files} logs: {would} {self.added} episodes, {self.steps} steps, to {self.store}"]
        if self.success:
            lines.append("  success: " + ", ".join(f"{key} {count}" for key, count in sorted(self.success.items())))
        if self.already:
            lines.append(f"  {self.already} were in the store already; nothing was added for them")
        if self.masked:
            lines.append(f"  {self.masked} rows left out")
        lines += [f"  {name}: {note}" for name, notes in sorted(self.notes.items()) for note in notes]
        return lines + [f"  refused {name}: {reason}" for name, reason in sorted(self.refused.items())]

    def note(self, name: str, sampled: Sampled, problems: Sequence[str]) -> None:
        """Keep what was left out of an episode."""
        self.masked += sampled.masked
        notes = [*problems, *(f"{rows} rows: {why}" for why, rows in sampled.reasons.items())]
        if notes:
            self.notes.setdefault(name, []).extend(notes)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the vectors of all logs hold."""

    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    statistics: Statistics


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An episode from a process: its rows, and their pictures where they were asked for."""

    log: str
    key: str
    """SHA-256 of its bytes and its name."""
    rows: Rows
    frames: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]


def ingest_logs(
    source: Path, store: Path, mapping: LogMapping, *, image_size: int, family: str | None = None, workers: int = 2,
    dry_run: bool = False, clip: bool = False, storage: StoreConfig | None = None,
) -> LogReport:
    """Add every usable stretch of every log at or below ``source`` to the store, which is created when absent.

    Raises ``UserError`` when nothing usable is found or it does not fit an existing store; nothing is committed then.
    """
    logs = find_logs(source, family)
    root = source if source.is_dir() else source.parent
    new = not store.exists() or not any(store.iterdir())
    replay = None if new else ReplayStore.open(store, storage)
    report = LogReport(store=str(store), files=len(logs), dry=dry_run)
    survey = survey_logs(logs, root, mapping, report)
    spec = Spec(cameras=tuple(mapping.cameras), image_size=image_size, proprio_names=survey.proprio_names,
                action_names=survey.action_names, control_hz=mapping.rate)
    statistics = survey.statistics
    if replay is not None:
        _check_fits(replay, spec, mapping.embodiment)
        statistics = replay.statistics
        _check_range(statistics, survey.statistics, clip=clip)
    config = hashlib.sha256(f"{to_yaml(mapping)}{image_size}{clip}".encode()).hexdigest()
    known = known_episodes(replay)
    for found in _read_all(logs, root, mapping, image_size, {key for key, made in known if made == config}, workers):
        if isinstance(found, Refused):
            report.refused[found.name] = found.reason
        elif (found.key, config) in known:
            report.already += 1
        else:
            if replay is None and not dry_run:
                replay = ReplayStore.create(store, spec=spec, statistics=statistics, embodiment=mapping.embodiment,
                                            config=storage)
            provenance = {**found.facts, "log": found.log, "episode": found.rows.name, "source_sha256": found.key,
                          "config_sha256": config, "clock": mapping.clock, "success_from": found.rows.success_from,
                          "oldest_message_s": found.rows.oldest}
            trajectory = _trajectory(found, statistics, mapping, provenance)
            if replay is not None and not dry_run:
                replay.append([trajectory])
            known.add((found.key, config))
            report.added += 1
            report.steps += len(trajectory)
            label = trajectory.success.value
            report.success[label] = report.success.get(label, 0) + 1
    if replay is not None:
        replay.close()
    if not report.added and not report.already:
        raise UserError(_nothing(report.refused))
    return report


def survey_logs(
    logs: Sequence[tuple[str, Path]], root: Path, mapping: LogMapping, report: LogReport
) -> Survey:
    """Read the vectors of every log, without its pictures: names, ranges, and what is masked.

    Raises ``UserError`` when nothing usable is found, or two logs have other dimensions.
    """
    names: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    first = ""
    proprio, action = [], []
    for family, path in logs:
        for episode in _episodes(family, path):
            name = _relative(path, root, episode.name)
            if isinstance(episode, Refused):
                report.refused[name] = episode.reason
                continue
            try:
                sampled = sample(episode, mapping, folder=root)
                found = (dimension_names(mapping.proprio, episode.streams),
                         dimension_names(mapping.action, episode.streams))
            except UserError as error:
                report.refused[name] = str(error)
                continue
            report.note(name, sampled, episode.problems)
            if not sampled.rows:
                report.refused[name] = "no two rows in a row are usable"
                continue
            if names is None:
                names, first = found, name
            if found != names:
                raise UserError(f"{name} has other dimensions than {first}: {', '.join(found[0] + found[1])[:120]} "
                                "against " + ", ".join(names[0] + names[1])[:120] + "; ingest them apart")
            proprio += [rows.proprio for rows in sampled.rows]
            action += [rows.action[:-1] for rows in sampled.rows]
    if names is None:
        raise UserError(_nothing(report.refused))
    state, commands = np.concatenate(proprio).astype(np.float64), np.concatenate(action)
    deviation = state.std(0)
    statistics = Statistics(action_low=commands.min(0), action_high=commands.max(0),
                            proprio_mean=state.mean(0).astype("f4"),
                            proprio_std=np.where(deviation > 1e-6, deviation, 1).astype("f4"))
    return Survey(proprio_names=names[0], action_names=names[1], statistics=statistics)


def _episodes(family: str, path: Path) -> Iterator[LogEpisode | Refused]:
    """Of one log; what its reader says against the whole of it is a ``Refused``."""
    try:
        yield from open_log(family, path).episodes()
    except UserError as error:
        yield Refused(name="", reason=str(error))


def _read_all(
    logs: Sequence[tuple[str, Path]], root: Path, mapping: LogMapping, image_size: int, known: set[str], workers: int
) -> Iterator[_Found | Refused]:
    """What is in every log, in order. Each process reads every ``workers``-th log; a pipe holds back who is ahead."""
    workers = max(1, min(workers, len(logs)))
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for i in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, daemon=True,
                                  args=(theirs, logs[i::workers], root, mapping, image_size, known))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for i, (_, path) in enumerate(logs):
            pipe = pipes[i % workers]
            try:
                while (item := pipe.recv()) is not None:
                    yield item
            except EOFError:
                raise UserError(f"the process that read {_relative(path, root, '')} died; that is often memory: try "
                                "workers=1") from None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(
    pipe: Connection, logs: Sequence[tuple[str, Path]], root: Path, mapping: LogMapping, image_size: int,
    known: set[str],
) -> None:
    """Send what each log holds, and None after it."""
    for family, path in logs:
        for episode in _episodes(family, path):
            if not isinstance(episode, Refused):  # those were reported by the survey
                for item in _decode(episode, _relative(path, root, ""), root, mapping, image_size, known):
                    pipe.send(item)
        pipe.send(None)


def _decode(
    episode: LogEpisode, log: str, root: Path, mapping: LogMapping, image_size: int, known: set[str]
) -> Iterator[_Found | Refused]:
    try:
        stretches = sample(episode, mapping, folder=root).rows
    except UserError:
        return  # the survey said so
    for rows in stretches:
        key = hashlib.sha256(f"{episode.sha256} {rows.name}".encode()).hexdigest()
        frames: dict[str, np.ndarray] = {}
        if key not in known:
            try:
                frames = {name: _pictures(episode.streams[camera.stream], rows.picture[name], camera.crop, image_size)
                          for name, camera in mapping.cameras.items()}
            except ValueError as reason:
                yield Refused(name=f"{log} {rows.name}".strip(), reason=str(reason))
                continue
        yield _Found(log=log, key=key, rows=rows, frames=frames, facts=dict(episode.facts))


def _pictures(
    stream: Stream, messages: np.ndarray, crop: tuple[float, float, float, float], size: int
) -> np.ndarray:
    """Squares of ``size`` pixels (PIL, bilinear, each message decoded once). Raises ``ValueError``."""
    assert stream.pictures is not None, "an image stream has pictures"
    wanted, place = np.unique(messages, return_inverse=True)
    made = np.empty((len(wanted), size, size, 3), np.uint8)
    count = 0
    for count, picture in enumerate(stream.pictures(wanted.tolist()), 1):
        height, width = picture.shape[:2]
        box = (crop[0] * width, crop[1] * height, crop[2] * width, crop[3] * height)
        made[count - 1] = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box))
    if count != len(wanted):
        raise ValueError(f"{stream.name}: {count} pictures for {len(wanted)} messages")
    return made[place.reshape(-1)]


def _trajectory(
    found: _Found, statistics: Statistics, mapping: LogMapping, provenance: Mapping[str, Any]
) -> Trajectory:
    rows = found.rows
    return log_trajectory(
        frames=found.frames, proprio=rows.proprio, action=rows.action, shows_success=rows.shows_success[1:],
        success=rows.success, timestamp=rows.time - rows.time[0], statistics=statistics,
        task=rows.instruction or mapping.embodiment, instruction=rows.instruction, embodiment=mapping.embodiment,
        provenance=json.loads(json.dumps(provenance, default=str)))


def _check_fits(store: ReplayStore, spec: Spec, embodiment: str) -> None:
    pairs = [("embodiment", store.embodiment, embodiment), ("cameras", store.spec.cameras, spec.cameras),
             ("image_size", store.spec.image_size, spec.image_size),
             ("proprio", store.spec.proprio_names, spec.proprio_names),
             ("action", store.spec.action_names, spec.action_names),
             ("rate", round(store.spec.control_hz, 2), round(spec.control_hz, 2))]
    for name, expected, given in pairs:
        if expected != given:
            raise UserError(f"{name} does not match: the store {store.path} has {expected!s:.120}, the mapping "
                            f"{given!s:.120}; correct the mapping or give another store=<folder>")


def _check_range(stored: Statistics, found: Statistics, *, clip: bool) -> None:
    slack = 1e-4 * (stored.action_high - stored.action_low) + 1e-6
    outside = (found.action_low < stored.action_low - slack) | (found.action_high > stored.action_high + slack)
    if outside.any() and not clip:
        i = int(np.argmax(outside))
        raise UserError(f"actions do not fit: dimension {i} goes from {found.action_low[i]:.4g} to "
                        f"{found.action_high[i]:.4g}, the store's range is [{stored.action_low[i]:.4g}, "
                        f"{stored.action_high[i]:.4g}]; give another store=<folder>, or type clip=true")


def _nothing(refused: Mapping[str, str]) -> str:
    first = next((f"; {name}: {why}" for name, why in sorted(refused.items())), "")
    more = f" ({len(refused) - 1} more were refused)" if len(refused) > 1 else ""
    return f"nothing usable was found{first}{more}; python main.py ingest action=inspect shows what is there"


def _relative(path: Path, root: Path, name: str) -> str:
    """How a log, or an episode in it, is named in reports and provenance."""
    shown = str(path.relative_to(root)) if path != root else path.name
    return shown if not name or name == shown else f"{shown} {name}"
