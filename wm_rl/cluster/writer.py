"""The one process that writes to the replay store beside a learner: everything collected or imagined passes here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.budget import StoreConfig
from data.store import ReplayStore
from data.types import NOT_OURS, Source, Success, Trajectory
from wm_rl.cluster.crew import Actor

_FLOATS = ("proprio", "action", "log_prob", "reward", "uncertainty", "timestamp")
_KEPT = 100
"""Quarantined episodes whose rows are kept; of later ones only the provenance is."""


class Arrival(NamedTuple):
    """What a supervisor needs to know of an episode that reached the writer."""

    source: Source
    stored: bool
    """False: quarantined."""
    success: bool
    steps: int
    version: float
    """Mean over the decisions of the policy's version."""
    reward: float
    uncertainty: float


class Writer(Actor):
    """Appends to the store; an episode with values that are not finite goes to ``quarantine`` instead."""

    def __init__(self, store: Path, storage: StoreConfig, quarantine: Path) -> None:
        self._store, self._quarantine = ReplayStore.open(store, storage), quarantine
        self._news: list[Arrival] = []

    def append(self, trajectory: Trajectory) -> None:
        """Commit an episode; it is recoverable once this returns. Raises what ``ReplayStore.append`` raises."""
        poisoned = poisoned_fields(trajectory)
        if poisoned:
            self._put_aside(trajectory, poisoned)
        else:
            self._store.append([trajectory])
        self._news.append(Arrival(
            source=trajectory.source, stored=not poisoned, success=trajectory.success is Success.YES,
            steps=len(trajectory), version=float(trajectory.policy_version[trajectory.decision].mean()),
            reward=float(trajectory.reward.sum()), uncertainty=float(trajectory.uncertainty.mean())))

    def report(self) -> list[Arrival]:
        """What arrived since the last report."""
        news, self._news = self._news, []
        return news

    def close(self) -> None:
        """Seal what was written."""
        self._store.close()

    def _put_aside(self, trajectory: Trajectory, poisoned: list[str]) -> None:
        """``<number>.json``: what is wrong and where it came from; ``<number>.npz``: the rows as they came."""
        self._quarantine.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in self._quarantine.glob("*.json"))
        facts = {"not_finite": poisoned, "source": trajectory.source, "task": trajectory.task, "steps": len(trajectory),
                 "embodiment": trajectory.embodiment, "provenance": dict(trajectory.provenance)}
        if number < _KEPT:
            rows: dict[str, Any] = {name: getattr(trajectory, name)
                                    for name in (*_FLOATS, "action_token", "decision", "policy_version")}
            frames: dict[str, Any] = {f"rgb_{camera}": values for camera, values in trajectory.frames.items()}
            np.savez_compressed(self._quarantine / f"{number:06d}.npz", **rows, **frames)
        (self._quarantine / f"{number:06d}.json").write_text(json.dumps(facts, indent=1, default=str))


def poisoned_fields(trajectory: Trajectory) -> list[str]:
    """Names of the fields with values that are not finite. ``log_prob`` counts where a policy of ours acted."""
    ours = (trajectory.policy_version != NOT_OURS).any()
    return [name for name in _FLOATS
            if (name != "log_prob" or ours) and not np.isfinite(getattr(trajectory, name)).all()]
