"""What a run of ``ingest`` did, per file and in all: lines for people, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from data.logs.sample import Sampled
from data.logs.statistics import Fitted
from data.logs.streams import LogEpisode, Refused
from data.types import Trajectory


@dataclass(kw_only=True)
class FileReport:
    """Of one log."""

    episodes: int = 0
    """That were added; with ``dry_run``, that would be."""
    steps: int = 0
    idle: int = 0
    """Steps in which the robot stands still; they are marked and kept."""
    already: int = 0
    """Episodes that were in the store, or in another file of this run."""
    masked: dict[str, int] = field(default_factory=dict)
    """Why rows were left out -> how many."""
    refused: dict[str, str] = field(default_factory=dict)
    """Episode (empty: the whole file) -> reason."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What was skipped in an episode, and why -> in how many episodes."""


@dataclass(kw_only=True)
class LogReport:
    """What one run did."""

    store: str
    dry: bool
    files: dict[str, FileReport] = field(default_factory=dict)
    """By the log's path below the source."""
    success: dict[str, int] = field(default_factory=dict)
    """Label -> episodes that were added."""
    fitted: Fitted | None = None
    """What the actions are normalised by; None until all logs were looked at."""
    dimensions: Sequence[str] = ()
    """Names of the actions."""
    clipped: dict[str, int] = field(default_factory=dict)
    """Dimension of the action -> values that were clipped."""

    def of(self, log: str) -> FileReport:
        """The part about one log."""
        return self.files.setdefault(log, FileReport())

    def refuse(self, log: str, refused: Refused) -> None:
        """Keep why an episode, or a whole file, is not used."""
        self.of(log).refused["" if refused.name == log else refused.name] = refused.reason

    def sampled(self, log: str, episode: LogEpisode, sampled: Sampled) -> None:
        """Keep what was left out of an episode."""
        mine = self.of(log)
        for reason, rows in sampled.reasons.items():
            mine.masked[reason] = mine.masked.get(reason, 0) + rows
        for problem in episode.problems:
            mine.skipped[problem] = mine.skipped.get(problem, 0) + 1

    def add(self, log: str, trajectory: Trajectory, clipped: Int64[np.ndarray, " a"]) -> None:
        """Count what went into the store, and how many values of each dimension of its actions were ``clipped``."""
        mine, label = self.of(log), trajectory.success.value
        mine.episodes += 1
        mine.steps += len(trajectory)
        mine.idle += sum(last - first for first, last in trajectory.provenance["idle_steps"])
        self.success[label] = self.success.get(label, 0) + 1
        for name, values in zip(self.dimensions, clipped.tolist(), strict=True):
            if values:
                self.clipped[name] = self.clipped.get(name, 0) + values

    @property
    def added(self) -> int:
        """Episodes."""
        return sum(each.episodes for each in self.files.values())

    @property
    def already(self) -> int:
        """Episodes that were in the store."""
        return sum(each.already for each in self.files.values())

    @property
    def steps(self) -> int:
        """Control steps that were added."""
        return sum(each.steps for each in self.files.values())

    @property
    def idle(self) -> int:
        """Steps that were marked idle."""
        return sum(each.idle for each in self.files.values())

    @property
    def masked(self) -> int:
        """Rows that were left out."""
        return sum(sum(each.masked.values()) for each in self.files.values())

    @property
    def refused(self) -> dict[str, str]:
        """File and episode -> reason."""
        return {f"{log} {name}".strip(): reason for log, each in self.files.items()
                for name, reason in each.refused.items()}

    def lines(self) -> list[str]:
        """For people."""
        would = "would add" if self.dry else "added"
        lines = [f"{len(self.files)} logs: {would} {self.added} episodes, {self.steps} steps, to {self.store}"]
        if self.success:
            lines.append("  success: " + ", ".join(f"{key} {count}" for key, count in sorted(self.success.items())))
        if self.already:
            lines.append(f"  {self.already} were in the store already; nothing was added for them")
        lines += self._range_lines()
        if self.idle:
            lines.append(f"  {self.idle} steps are idle: marked, and kept")
        if self.masked:
            lines.append(f"  {self.masked} rows left out")
        for log, each in sorted(self.files.items()):
            lines += [f"  {log}: {rows} rows: {reason}" for reason, rows in each.masked.items()]
            lines += [f"  {log}: {problem}" + (f" (in {episodes} episodes)" if episodes > 1 else "")
                      for problem, episodes in each.skipped.items()]
        return lines + [f"  refused {name}: {reason}" for name, reason in sorted(self.refused.items())]

    def _range_lines(self) -> list[str]:
        if self.fitted is None:
            return []
        statistics = self.fitted.statistics
        lines = [f"  statistics {statistics.fingerprint}: {self.fitted.origin}"]
        lines += [f"  {self.dimensions[i]}: the full range, since {why}" for i, why in self.fitted.full.items()]
        for i, name in enumerate(self.dimensions):
            if name in self.clipped:
                lines.append(f"  {name}: {self.clipped[name]} values clipped to [{statistics.action_low[i]:.4g}, "
                             f"{statistics.action_high[i]:.4g}]")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values: ``totals`` of everything, and ``files`` one by one."""
        files: Mapping[str, Any] = {log: vars(each) for log, each in sorted(self.files.items())}
        fitted = self.fitted
        normalised = {} if fitted is None else {
            **fitted.statistics.to_dict(), "origin": fitted.origin,
            "full_range": {self.dimensions[i]: why for i, why in fitted.full.items()}}
        return {"store": self.store, "dry_run": self.dry, "statistics": normalised, "clipped": self.clipped,
                "totals": {"files": len(self.files), "episodes": self.added, "steps": self.steps,
                           "idle": self.idle, "already": self.already, "masked_rows": self.masked,
                           "refused": len(self.refused), "success": self.success},
                "files": files}

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
