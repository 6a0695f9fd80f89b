"""Whether every byte of a replay store is as it was committed; and a way out when it is not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data import outcome_labels
from data.layout import ACTED, field_table, read_array, read_attributes
from data.repair import quarantine, restore
from data.salvage import Problem, Salvage
from data.segment import owned
from data.store import store_attributes
from data.text import ranges
from data.types import Spec, UserError


@dataclass(frozen=True, kw_only=True)
class SegmentReport:
    """One segment, or what was estimated for one."""

    folder: str
    """Below the store."""
    state: str
    """``hot``, ``cold``, ``open`` (its writer lives), ``left`` (its writer died) or ``estimate``."""
    episodes: int
    problems: Sequence[Problem]
    unfinished: int
    """Bytes of an append under way, or cut short: no damage."""

    def lines(self) -> list[str]:
        """One for each problem."""
        said = []
        for problem in self.problems:
            cost = f"episodes {ranges(problem.episodes)} of {self.episodes}" if problem.episodes else "costs no episode"
            if problem.where == "tables":
                cost = "nothing in it can be read"
            said.append(f"{self.folder}: {problem.where}: {problem.what} ({cost})")
        if self.unfinished:
            said.append(f"{self.folder}: journal: {self.unfinished} bytes at its end are of an append that is under way"
                        " or was cut short (no damage)")
        return said


@dataclass(kw_only=True)
class Report:
    """What ``verify`` found and did."""

    segments: list[SegmentReport]
    repaired: list[str] = field(default_factory=list)
    """What a repair did, a line each."""
    remaining: list[str] = field(default_factory=list)
    """Damaged folders that the store holds still."""

    @property
    def damaged(self) -> list[SegmentReport]:
        """Those with a problem."""
        return [segment for segment in self.segments if segment.problems]

    def lines(self) -> list[str]:
        """For people."""
        said = [line for segment in self.segments for line in segment.lines()]
        checked = sum(segment.state != "estimate" for segment in self.segments)
        verdict = f"{len(self.damaged)} damaged" if self.damaged else "all as they were committed"
        return [*said, f"{checked} segments, {sum(segment.episodes for segment in self.segments)} episodes: {verdict}",
                *self.repaired]


def verify(path: str | Path, *, repair: bool) -> Report:
    """Compare every byte with its checksum. The store may be in use, and may be too damaged to be opened.

    ``repair`` moves damaged segments to ``control/quarantine`` and appends their intact episodes again, in a new
    segment with their commit times; it also seals what dead writers left. A segment whose tables are damaged gives
    nothing back; one that is still being written is only reported.

    Raises ``UserError`` when there is no store.
    """
    path = Path(path)
    spec = Spec.from_dict(store_attributes(path)["spec"])
    report = Report(segments=[])
    for kind in ("open", "seg"):  # one that is sealed meanwhile is seen in one of the two
        for folder in sorted(entry for entry in (path / kind).iterdir() if entry.is_dir()):
            found = _check(folder, spec)
            if found is not None:
                report.segments.append(found)
    report.segments += [_check_overlay(folder, spec) for folder in sorted((path / "cloned").iterdir())
                        if folder.is_dir() and (path / "seg" / folder.name).exists()]
    report.segments += [_check_labels(file) for file in sorted((path / outcome_labels.FOLDER).glob("*.json"))]
    for segment in report.damaged:
        if not repair or not quarantine(path, path / segment.folder, segment.lines()):
            report.remaining.append(segment.folder)
            if repair:
                report.repaired.append(f"{segment.folder} was left as it is, since it is being written; stop its "
                                       "writer and repair again")
        elif segment.state == "estimate":
            lost = ("known behaviour again; label them with python main.py pretrain"
                    if segment.folder.startswith("cloned") else
                    "labelled outcome again; label them with python main.py store action=label_success")
            report.repaired.append(f"{segment.folder} was moved to {path}/control/quarantine: its episodes have no "
                                   f"{lost}")
    if repair:
        report.repaired += restore(path)
    return report


def _check(folder: Path, spec: Spec) -> SegmentReport | None:
    """None for a segment that was moved while it was looked at."""
    sealed = folder.parent.name == "seg"
    alive = False
    if not sealed:
        with owned(folder) as left:
            alive = not left
    while True:
        try:
            inode = folder.stat().st_ino
            segment = Salvage(folder, spec, sealed=sealed)
            if folder.stat().st_ino == inode:  # else a compressed one took its place
                break
        except FileNotFoundError:
            return None
        except PermissionError as error:
            raise UserError(f"cannot read {error.filename}: {os.strerror(errno.EACCES).lower()}; make it readable for "
                            "you, or type this as its owner") from None
    state = segment.tier if sealed else "open" if alive else "left"
    return SegmentReport(folder=f"{folder.parent.name}/{folder.name}", state=state, episodes=len(segment),
                         problems=segment.problems, unfinished=segment.unfinished)


def _check_overlay(folder: Path, spec: Spec) -> SegmentReport:
    """Only sizes: estimates have no checksums, since they can be made again."""
    problems = []
    try:
        rows = read_attributes(folder.parents[1] / "seg" / folder.name)["rows"]
    except (OSError, ValueError, KeyError):
        rows = None  # the segment's own damage
    fields = field_table(spec)
    for name in ("action_token", "log_prob", "decision") if rows is not None else ():
        try:
            json.loads((folder / "zarr.json").read_text())
            read_array(folder / name, ACTED[name], (rows, *fields[name]["shape"]))
        except (FileNotFoundError, ValueError) as error:
            problems.append(Problem(where=name, what=str(error), episodes=()))
    return SegmentReport(folder=f"cloned/{folder.name}", state="estimate", episodes=0, problems=problems, unfinished=0)


def _check_labels(file: Path) -> SegmentReport:
    """Whether labels of outcomes can be read; they have no checksums either."""
    problems = []
    try:
        outcome_labels.read_labels(file)
    except ValueError as error:
        problems.append(Problem(where="labels", what=str(error), episodes=()))
    return SegmentReport(folder=f"{file.parent.name}/{file.name}", state="estimate", episodes=0, problems=problems,
                         unfinished=0)
