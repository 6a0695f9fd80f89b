"""Take damaged segments out of a replay store, and give it their intact episodes again in new ones.

    <store>/control/quarantine/<number>/       a damaged segment, as it was found; nothing reads it
    <store>/control/quarantine/<number>.json   what was wrong, and once they are back, which episodes went where

A new segment says in its attribute ``repaired`` which episodes of which segment it holds. So a repair that is killed
is finished by the next one: an episode is never in the store twice, and never gone for good.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import journal, outcome_labels
from data.budget import StoreConfig
from data.layout import ACTED, EPISODE, WORDS, read_array, read_attributes, sign, write_array, write_group, write_json
from data.salvage import Salvage
from data.segment import SegmentWriter, owned, sync_file, sync_tree
from data.store import ReplayStore
from data.types import Source

_COMMIT_TIME, _SOURCE = EPISODE.index("commit_time"), EPISODE.index("source")


def quarantine(path: Path, folder: Path, why: Sequence[str]) -> bool:
    """Move a damaged segment, overlay or file of labels aside; false when it is still being written, or gone."""
    kind = folder.parent.name
    if kind == "open":
        with owned(folder) as mine:
            if mine:
                _move(path, folder, why)
            return mine
    if folder.exists():
        _move(path, folder, why)
    return True


def restore(path: Path) -> list[str]:
    """Give the store the intact episodes of quarantined segments, where that was not done yet. Says what it did."""
    store = ReplayStore.open(path, StoreConfig(durability="sync"))
    store.recover()
    # The newest first: one that had taken the place of an older one knows it.
    return [_restore(store, file) for file in sorted((path / "control" / "quarantine").glob("*.json"), reverse=True)
            if file.with_suffix("").is_dir() and "restored" not in json.loads(file.read_text())]


def _move(path: Path, folder: Path, why: Sequence[str]) -> None:
    kind, aside = folder.parent.name, path / "control" / "quarantine"
    estimate = kind in ("cloned", outcome_labels.FOLDER)
    name = f"{kind}-{folder.stem}-{time.time_ns()}" if estimate else folder.name
    aside.mkdir(exist_ok=True)
    report: dict[str, Any] = {"from": kind, "problems": list(why)}
    write_json(aside / f"{name}.json", report | ({"restored": None} if estimate else {}))
    if not estimate:  # its number is not used again, and a rollback does not miss it
        descriptor = os.open(path / "control" / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        gone = os.open(path / "control" / "evicted", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            _, end = journal.read(path / "control" / "evicted")
            journal.append(gone, end, journal.encode({"segment": name, "time": time.time_ns()}))
            os.fsync(gone)
        finally:
            os.close(gone)
            os.close(descriptor)
    folder.rename(aside / name)
    for parent in (aside, folder.parent):
        sync_file(parent)


def _restore(store: ReplayStore, file: Path) -> str:
    """Every step may be repeated: a kill in between leaves it to the next repair."""
    report, name = json.loads(file.read_text()), file.stem
    damaged = Salvage(file.with_suffix(""), store.spec, sealed=report["from"] == "seg")
    kept = damaged.intact
    target = _find(store, name) if kept else None
    if kept and target is None:
        target = _rewrite(store, damaged, kept)
    if target is not None:
        _bring_marks(store, damaged, kept, target)
    write_json(file, report | {"restored": {"segment": target, "episodes": kept}})
    lost = len(damaged) - len(kept)
    what = f"{lost} episodes lost" if damaged.readable else "nothing in it could be read"
    back = f"{len(kept)} episodes are in segment {target} now" if kept else "no episode was intact"
    return f"segment {name} was moved to {file.with_suffix('')}: {back}, {what}"


def _find(store: ReplayStore, name: str) -> str | None:
    """The segment that already holds the intact episodes of ``name``."""
    return next((segment.name for segment in store.segments if name in segment.repaired), None)


def _rewrite(store: ReplayStore, damaged: Salvage, kept: Sequence[int]) -> str:
    """Write the episodes to a new sealed segment, with the commit times they had; returns its number."""
    building = store.path / "tmp" / uuid.uuid4().hex
    (building / "seg").mkdir(parents=True)
    table = damaged.table[kept]
    folder = building / "open" / damaged.name
    journal_of = SegmentWriter.prepare(folder, store.spec, source=Source(WORDS["source"][table[0, _SOURCE]]),
                                       capacity=int((table[:, 1] + 1).sum()))
    writer = SegmentWriter(folder, journal_of, store.spec, sync=False)
    for episode, commit_time in zip(kept, table[:, _COMMIT_TIME].tolist(), strict=True):
        writer.commit([damaged.trajectory(episode)], [commit_time])
    writer.seal()
    sealed = building / "seg" / damaged.name
    origins = {damaged.name: list(kept)} | {name: [episodes[episode] for episode in kept]
                                            for name, episodes in damaged.repaired.items()}
    attributes = read_attributes(sealed) | {"repaired": origins}
    columns = read_attributes(store.path)["fields"]
    write_group(sealed, sign(sealed, attributes, unsigned=columns))
    sync_tree(sealed)
    with store._locked():
        name = f"{store._next_number():08d}"
        sealed.rename(store.path / "seg" / name)
    sync_file(store.path / "seg")
    store.refresh()
    return name


def _bring_marks(store: ReplayStore, damaged: Salvage, kept: Sequence[int], target: str) -> None:
    """What labellings and a rollback said of the damaged segment, for the new one."""
    outcomes = store.path / outcome_labels.FOLDER / f"{damaged.name}.json"
    if outcomes.exists():
        with contextlib.suppress(ValueError):  # damaged: moved aside with its segment
            labels, rule = outcome_labels.read_labels(outcomes)
            moved = {row: labels[old] for row, old in enumerate(kept) if old in labels}
            outcome_labels.write_labels(store.path, target, moved, rule)
        outcomes.rename(store.path / "control" / "quarantine" / damaged.name / outcomes.name)
    overlay, hidden = store.path / "cloned" / damaged.name, store.path / "control" / "hidden" / damaged.name
    if overlay.exists():
        rows = np.concatenate([np.arange(start, start + length + 1)
                               for start, length in damaged.table[kept, :2].tolist()])
        building = store.path / "tmp" / uuid.uuid4().hex
        write_group(building, read_attributes(overlay))
        for name in ("action_token", "log_prob", "decision"):
            dimensions = json.loads((overlay / name / "zarr.json").read_text())["dimension_names"]
            shape = (damaged.rows, *damaged.columns[name].shape[1:])
            values = read_array(overlay / name, ACTED[name], shape)[rows]
            write_array(building / name, values, dtype=ACTED[name], dimensions=dimensions)
        sync_tree(building)
        if not (store.path / "cloned" / target).exists():
            building.rename(store.path / "cloned" / target)
        overlay.rename(store.path / "control" / "quarantine" / damaged.name / "cloned")
    if hidden.exists():
        visible = sum(episode < int(hidden.read_text()) for episode in kept)
        building = store.path / "tmp" / uuid.uuid4().hex
        building.write_text(str(visible))
        building.rename(hidden.with_name(target))
        hidden.unlink()
    store.refresh()
