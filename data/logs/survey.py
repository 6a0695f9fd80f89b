"""The first look at all logs: their vectors, without pictures. It says what they hold, and which episodes to decode."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.logs.mapping import LogMapping
from data.logs.readers import open_log
from data.logs.report import LogReport
from data.logs.sample import Rows, dimension_names, sample
from data.logs.streams import LogEpisode, Pictures, Refused
from data.types import UserError

Watch = Callable[[str, int, int], None]
"""Told what is going on, how many are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """An episode of a log, to be decoded."""

    family: str
    path: Path
    number: int
    """Its place among all that ``Log.episodes`` yields."""
    name: str
    sha256: str
    stretches: Mapping[str, Rows]
    """Those that are not in the store, by their ``episode_key``."""
    facts: Mapping[str, Any]
    pictures: Mapping[str, Pictures] | None
    """Of each camera; None where these are found only by reading the episode again."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What the vectors of all logs hold."""

    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    proprio: Float32[np.ndarray, "r p"]
    """Of every usable row, in the units of the store, those included that are in the store already."""
    action: Float32[np.ndarray, "t a"]
    """Of every step, likewise."""
    wanted: Sequence[Wanted]
    """In the order of the logs."""


def survey_logs(
    logs: Sequence[tuple[str, Path]], root: Path, mapping: LogMapping, known: set[str], report: LogReport,
    watch: Watch,
) -> Survey:
    """Read the vectors of every log; the report gets what is refused, masked, or ``known`` by its ``episode_key``.

    Raises ``UserError`` when nothing usable is found, or two logs have other dimensions.
    """
    names: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    first, seen = "", set[str]()
    proprio, action, wanted = [], [], []
    for i, (family, path) in enumerate(logs):
        watch("read", i, len(logs))
        log = log_name(path, root)
        report.of(log)
        for number, episode in enumerate(episodes_of(family, path)):
            if isinstance(episode, Refused):
                report.refuse(log, episode)
                continue
            try:
                sampled = sample(episode, mapping, folder=root)
                found = (dimension_names(mapping.proprio, episode.streams),
                         dimension_names(mapping.action, episode.streams))
            except UserError as error:
                report.refuse(log, Refused(name=episode.name, reason="; ".join([str(error), *episode.problems])))
                continue
            report.sampled(log, episode, sampled)
            if not sampled.rows:
                report.refuse(log, Refused(name=episode.name, reason="no two rows in a row are usable"))
                continue
            if names is None:
                names, first = found, f"{log} {episode.name}"
            if found != names:
                raise UserError(f"{log} {episode.name} has other dimensions than {first}: "
                                f"{', '.join(found[0] + found[1])[:120]} against "
                                f"{', '.join(names[0] + names[1])[:120]}; ingest them apart")
            keys = [episode_key(episode, rows) for rows in sampled.rows]
            new = [(key, rows) for key, rows in zip(keys, sampled.rows, strict=True) if key not in seen]
            proprio += [rows.proprio for _, rows in new]
            action += [rows.action[:-1] for _, rows in new]
            missing = {key: rows for key, rows in new if key not in known}
            report.of(log).already += len(keys) - len(missing)
            if missing:
                wanted.append(Wanted(family=family, path=path, number=number, name=episode.name, stretches=missing,
                                     sha256=episode.sha256, facts=episode.facts, pictures=_portable(episode, mapping)))
            seen |= set(keys)
    watch("read", len(logs), len(logs))
    if names is None:
        raise UserError(nothing_usable(report))
    return Survey(proprio_names=names[0], action_names=names[1], proprio=np.concatenate(proprio),
                  action=np.concatenate(action), wanted=wanted)


def episodes_of(family: str, path: Path) -> Iterator[LogEpisode | Refused]:
    """Of one log; what its reader says against the whole of it is a ``Refused``."""
    try:
        yield from open_log(family, path).episodes()
    except UserError as error:
        yield Refused(name="", reason=str(error))


def pictures_of(episode: LogEpisode, mapping: LogMapping) -> dict[str, Pictures]:
    """Of each camera of the mapping."""
    found = {name: episode.streams[camera.stream].pictures for name, camera in mapping.cameras.items()}
    return {name: pictures for name, pictures in found.items() if pictures is not None}


def _portable(episode: LogEpisode, mapping: LogMapping) -> dict[str, Pictures] | None:
    portable = all(episode.streams[camera.stream].portable for camera in mapping.cameras.values())
    return pictures_of(episode, mapping) if portable else None


def episode_key(episode: LogEpisode, rows: Rows) -> str:
    """SHA-256 of the bytes of an episode and the name of a stretch of it."""
    return hashlib.sha256(f"{episode.sha256} {rows.name}".encode()).hexdigest()


def log_name(path: Path, root: Path) -> str:
    """How a log is named in reports and provenance: without what is above the source."""
    return str(path.relative_to(root)) if path != root else path.name or path.resolve().name


def nothing_usable(report: LogReport) -> str:
    """One line, with the first reason."""
    refused = report.refused
    first = next((f"; {name}: {why}" for name, why in sorted(refused.items())), "")
    more = f" ({len(refused) - 1} more were refused)" if len(refused) > 1 else ""
    return f"nothing usable was found{first}{more}; python main.py ingest action=inspect shows what is there"
