"""Logs of any format into the replay store: surveyed, decoded side by side, committed in order by one process.

What is committed depends on the files and the mapping alone, not on the number of processes, and an episode that is
in the store already is not decoded again: a run that was killed is repeated and ends in the same store.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from data.budget import StoreConfig
from data.logs.decode import Found, decode_all
from data.logs.idle import idle_steps
from data.logs.mapping import LogMapping, to_yaml
from data.logs.readers import find_logs
from data.logs.report import LogReport
from data.logs.statistics import Fitted, check_range, clipped, fit
from data.logs.survey import Survey, Watch, nothing_usable, survey_logs
from data.logs.trajectory import known_episodes, log_trajectory
from data.store import ReplayStore
from data.types import Spec, Statistics, Trajectory, UserError


def ingest_logs(
    source: Path, store: Path, mapping: LogMapping, *, image_size: int, family: str | None = None, workers: int = 1,
    dry_run: bool = False, action_range: str = "quantile", clip: bool = False, known: Statistics | None = None,
    storage: StoreConfig | None = None, report_to: Path | None = None, watch: Watch = lambda what, done, total: None,
) -> LogReport:
    """Add every usable stretch of every log at or below ``source`` to the store, which is created when absent.

    ``action_range``: how a new store's range is found, and how much may be clipped: see ``data.logs.statistics``.
    ``clip``: also clip more than that. ``known``: the statistics that the logs were exported with, which a new store
    keeps if they fit. ``report_to``: a file for the report as JSON, written also when the run ends early.

    Raises ``UserError`` when nothing usable is found or it does not fit an existing store; nothing is committed then.
    """
    report = LogReport(store=str(store), dry=dry_run)
    try:
        _ingest(source, store, mapping, report, image_size=image_size, family=family, workers=workers, clip=clip,
                action_range=action_range, known=known, storage=storage, watch=watch)
    finally:
        if report_to is not None:
            report.write(report_to)
    return report


def _ingest(
    source: Path, store: Path, mapping: LogMapping, report: LogReport, *, image_size: int, family: str | None,
    workers: int, clip: bool, action_range: str, known: Statistics | None, storage: StoreConfig | None, watch: Watch,
) -> None:
    logs = find_logs(source, family)
    root = source if source.is_dir() else source.parent
    new = not store.exists() or not any(store.iterdir())
    replay = None if new else ReplayStore.open(store, storage)
    config = hashlib.sha256(f"{to_yaml(mapping)}{image_size}".encode()).hexdigest()
    there = {key for key, made in known_episodes(replay) if made == config}
    survey = survey_logs(logs, root, mapping, there, report, watch)
    spec = Spec(cameras=tuple(mapping.cameras), image_size=image_size, proprio_names=survey.proprio_names,
                action_names=survey.action_names, control_hz=mapping.rate)
    if replay is not None:
        _check_fits(replay, spec, mapping.embodiment)
        if not clip and survey.wanted:
            check_range(replay.statistics, survey.action, spec.action_names, kind=action_range,
                        what=f"the store {store}")
        report.fitted = Fitted(statistics=replay.statistics, origin="those of the store")
    else:
        report.fitted = _fit(survey, known, action_range)
    report.dimensions, statistics = spec.action_names, report.fitted.statistics
    try:
        for found in decode_all(survey.wanted, root, mapping, image_size, workers, watch):
            if not isinstance(found, Found):
                report.refuse(*found)
                continue
            trajectory = _trajectory(found, statistics, mapping, config)
            if not report.dry:
                if replay is None:
                    replay = ReplayStore.create(store, spec=spec, statistics=statistics, embodiment=mapping.embodiment,
                                                config=storage)
                replay.append([trajectory])
            report.add(found.log, trajectory, clipped(statistics, found.rows.action[:-1]))
    finally:
        if replay is not None:
            replay.close()
    if not report.added and not report.already:
        raise UserError(nothing_usable(report))


def _fit(survey: Survey, known: Statistics | None, action_range: str) -> Fitted:
    """Statistics of a new store."""
    if known is not None and (len(known.action_low), len(known.proprio_mean)) == (
            survey.action.shape[1], survey.proprio.shape[1]) and not clipped(known, survey.action).any():
        return Fitted(statistics=known, origin="those that the set was exported with")
    return fit(survey.proprio, survey.action, action_range)


def _trajectory(found: Found, statistics: Statistics, mapping: LogMapping, config: str) -> Trajectory:
    rows = found.rows
    provenance = {**found.facts, "log": found.log, "episode": rows.name, "source_sha256": found.key,
                  "config_sha256": config, "clock": mapping.clock, "success_from": rows.success_from,
                  "oldest_message_s": rows.oldest,
                  "idle_steps": idle_steps(rows.proprio, rows.action, statistics, mapping.rate)}
    return log_trajectory(
        frames=found.frames, proprio=rows.proprio, action=rows.action, shows_success=rows.shows_success[1:],
        success=rows.success, timestamp=rows.time - rows.time[0], statistics=statistics,
        task=rows.task or rows.instruction or mapping.embodiment, instruction=rows.instruction,
        embodiment=mapping.embodiment, provenance=json.loads(json.dumps(provenance, default=str)))


def _check_fits(store: ReplayStore, spec: Spec, embodiment: str) -> None:
    fix = "correct the mapping, or give another store=<folder>"
    pairs = [("embodiment", store.embodiment, embodiment, "type logs.embodiment=<name>, or embodiment in the mapping"),
             ("cameras", sorted(store.spec.cameras), sorted(spec.cameras),
              "type logs.cameras.<name>=<key>, or cameras in the mapping"),
             ("image_size", store.spec.image_size, spec.image_size, f"type logs.image_size={store.spec.image_size}"),
             ("proprio", store.spec.proprio_names, spec.proprio_names, fix),
             ("action", store.spec.action_names, spec.action_names, fix),
             # Nominal rates may be rounded (26.667 for 80 / 3).
             ("rate", round(store.spec.control_hz, 2), round(spec.control_hz, 2), fix)]
    for name, expected, given, remedy in pairs:
        if expected != given:
            raise UserError(f"{name} does not match: the store {store.path} has {expected!s:.120}, the logs "
                            f"{given!s:.120}; {remedy}")
