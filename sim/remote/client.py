"""A simulator in other processes behind the ``Env`` contract of ``data.types``.

A process that dies, hangs or raises is replaced: the episodes that it was playing end as truncated, with the last
observation that was seen of them, and the caller goes on. Processes that are lost again and again are an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.types import Source, Spec, Statistics, UserError
from sim.perturbation import Perturbation, Ranges, draw, fixed, ranges
from sim.remote.process import LostError, Program
from sim.remote.protocol import Answers
from sim.remote.rows import RemoteRows
from sim.task import pack, unpack

_log = logging.getLogger(__name__)


class RemoteEnv:
    """Rows of a simulator, in one process or in several that each have some of them."""

    world_model_version = -1
    rows_together = False
    """Whether the simulator steps its rows in one world, so that none can be made by itself (``only=rows``)."""

    def __init__(
        self,
        *,
        name: str,
        python: Path,
        factory: str,
        configs: Sequence[Mapping[str, Any]],
        start_seconds: float = 600.0,
        call_seconds: float = 120.0,
        restarts: int = 3,
        environment: Mapping[str, str] | None = None,
        source: Source | str = Source.SIM,
        perturbation: Perturbation | Mapping[str, Any] | None = None,
        randomise: str | Ranges | None = None,
    ) -> None:
        """Start the processes and wait until all are built.

        Args:
            name: Of the simulator, as in ``env=<name>`` and ``make <name>``.
            python: The interpreter that has it.
            factory: ``module:function`` there; ``sim.remote.serve`` says what it returns.
            configs: What it is given (JSON-able): one process each, in the order of their rows. All must describe the
                same robot.
            start_seconds: Longest start of a process.
            call_seconds: Longest step or reset.
            restarts: How many processes may be lost in a row, without one whole episode between them.
            environment: Variables that the processes have beside this one's.
            source: ``sim``, or ``real`` where it plays a robot.
            perturbation: What differs in every episode; or its factors by name, as a mapping.
            randomise: Ranges from which each episode's seed draws what differs, or their name.

        Raises:
            UserError: a process cannot be made, a configuration is wrong, or the simulator lacks a factor.
        """
        self.source, self._name, self._restarts, self._lost = Source(source), name, restarts, 0
        self._parts: list[RemoteRows] = []
        try:
            for config in configs:
                self._parts.append(RemoteRows(Program(
                    python=python, factory=factory, config=config, name=name, start_seconds=start_seconds,
                    call_seconds=call_seconds, environment=dict(environment or {}))))
            self.num_envs = 0
            for part in self._parts:  # all are building at the same time by now
                part.begin(self.num_envs)
                self.num_envs = part.rows.stop
            self._describe()
            self._perturbation = fixed(perturbation, self.factors, simulator=f"env={name}")
            self._varied = ranges(randomise, self.factors, simulator=f"env={name}")
        except LostError as error:
            self.close()
            _log.error("%s", error)
            raise UserError(f"{name} did not start in {python}: {error.reason}; mend its environment, or "
                            f"make it again: make {name}") from None
        except BaseException:
            self.close()
            raise
        self._note_perturbation()
        self.elapsed = np.zeros(self.num_envs, np.int64)
        """Control steps since each row's reset."""
        self._playing = np.zeros(self.num_envs, bool)
        self._instruction = [""] * self.num_envs
        self._changes: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        """By which each row's episode differs from nominal."""

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any]) -> tuple[dict, dict]:
        """Restart the rows of ``options["reset_mask"]`` with ``seed[row]`` (ignored elsewhere)."""
        rows = np.flatnonzero(options["reset_mask"]).tolist()
        if any(seed[row] is None for row in rows):
            raise ValueError("every row that is reset needs a seed: it alone decides the episode")
        waiting = np.asarray(options["reset_mask"], bool).copy()
        seeds = np.array([value or 0 for value in seed], np.int64)
        self._playing[rows] = False
        for row in rows:
            self._changes[row] = draw(self._perturbation, self._varied, int(seeds[row])).changes
        while waiting.any():
            lost = self._call(waiting, lambda part, mask: part.ask_to_reset(
                mask, seeds[part.rows], self._changes[part.rows]))
            waiting &= np.isin(np.arange(self.num_envs), lost)
        self.elapsed[rows] = 0
        self._playing[rows] = ~self._over()[rows]
        return self._observation(), self._info()

    def step(
        self, actions: Float32[np.ndarray, "n a"]
    ) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One control step of every row that is playing; parked rows are not asked."""
        asked = self._playing.copy()
        clipped = np.clip(actions, -1, 1)
        lost = self._call(asked, lambda part, mask: part.ask_to_step(mask, clipped[part.rows]))
        self.elapsed[asked] += 1
        self._playing &= ~self._over()
        if set(np.flatnonzero(asked & ~self._playing)) - set(lost):
            self._lost = 0
        reward = np.where(asked, self._gather(lambda shown: shown.reward), np.float32(0))
        return (self._observation(), reward, self._gather(lambda shown: shown.terminated),
                self._gather(lambda shown: shown.truncated), self._info())

    def expert_action(self) -> Float32[np.ndarray, "n a"]:
        """Ask what the simulator's scripted expert would do in each playing row; zeros in parked ones.

        Raises:
            UserError: it has none.
        """
        if not all(part.process.has_expert for part in self._parts):
            raise UserError(f"env={self._name} has no scripted expert for its tasks; start from a policy, "
                            "loop.warm_start=<folder>, or from logs")
        self._call(self._playing.copy(), lambda part, mask: part.ask_expert(mask))
        actions = np.concatenate([part.process.block.expert for part in self._parts])
        return np.where(self._playing[:, None], actions, np.float32(0))

    @property
    def perturbation(self) -> Perturbation:
        """What differs in episodes that are reset now."""
        return self._perturbation

    def perturb(self, perturbation: Perturbation) -> None:
        """Play every episode that is reset from now on under ``perturbation``, which replaces the present one.

        It is kept here and sent with each reset, so it outlives the processes.

        Raises:
            UserError: for a factor that the simulator lacks.
        """
        self._perturbation = fixed(perturbation, self.factors, simulator=f"env={self._name}")
        self._note_perturbation()

    def snapshot(self, row: int) -> bytes:
        """All that decides how ``row`` goes on, for ``restore``. Raises ``UserError`` where the simulator cannot."""
        part = self._restorable(row)
        taken = part.snapshot(row - part.rows.start)
        return pack({"task": self.row_tasks[row], "changes": self._changes[row], **taken})

    def restore(self, row: int, snapshot: bytes) -> tuple[dict, dict]:
        """Put ``row`` where ``snapshot`` was taken, of any row of the same task; returns observation and info.

        Raises:
            UserError: for bytes that are no snapshot, or of another task, or where the simulator cannot.
        """
        part, taken = self._restorable(row), unpack(snapshot)
        if taken.pop("task") != self.row_tasks[row]:
            raise UserError(f"expected a snapshot of {self.row_tasks[row]} for row {row}, got one of another task")
        self._changes[row] = taken.pop("changes")
        self._instruction[row] = part.restore(row - part.rows.start, taken, self._changes[row])
        self._playing[row] = ~self._over()[row]
        return self._observation(), self._info()

    def drive(self, actions: Float32[np.ndarray, "n a"], steps: int) -> float:
        """Let the one process repeat ``actions`` in the playing rows by itself; returns seconds. For benchmarks.

        Nothing of these steps is counted, and an episode's end is not looked at: reset the rows afterwards.
        """
        (part,) = self._parts
        part.process.block.actions[:], part.process.block.mask[:] = actions, self._playing
        part.process.ask("drive", steps=steps, side=0)
        return float(part.process.answer()[0]["elapsed"])

    def close(self) -> None:
        """End the processes."""
        for part in self._parts:
            part.process.close()
        self._parts = []

    def _describe(self) -> None:
        first = self._parts[0].description
        self.spec = Spec(cameras=tuple(first.cameras), image_size=first.image_size, control_hz=first.control_hz,
                         proprio_names=tuple(first.proprio_names), action_names=tuple(first.action_names))
        self.statistics = Statistics.from_dict(first.statistics)
        self.embodiment, self.max_episode_steps = first.embodiment, first.max_episode_steps
        self.metadata: dict[str, Any] = {"autoreset_mode": "disabled", "render_fps": first.control_hz}
        self.factors = frozenset(first.factors)
        """What of ``Perturbation`` the simulator has."""
        self.row_tasks = [task for part in self._parts for task in part.description.row_tasks]
        self.tasks = tuple(dict.fromkeys(self.row_tasks))

    def _note_perturbation(self) -> None:
        described = self._parts[0].description.provenance
        told = {"perturbation": self._perturbation.changes, "randomise": self._varied}
        self.provenance: Mapping[str, Any] = {**described, **told} if self.factors else described

    def _call(self, mask: np.ndarray, ask: Callable[[RemoteRows, np.ndarray], None]) -> list[int]:
        """Ask each process that has rows of the mask, side by side. Returns the rows of processes that were lost."""
        if not self._parts:
            raise RuntimeError("this RemoteEnv is closed")
        lost: list[int] = []
        asked = [part for part in self._parts if mask[part.rows].any()]
        for part in asked:
            ask(part, mask[part.rows])
        for part in asked:
            try:
                answer = part.answer()
            except LostError as error:
                self._replace(part, error)
                lost += range(part.rows.start, part.rows.stop)
            else:
                for row, text in answer.get("instructions", {}).items():
                    self._instruction[part.rows.start + int(row)] = text
        return lost

    def _replace(self, part: RemoteRows, error: LostError) -> None:
        """Start another process for ``part``, and end the episodes that were being played."""
        while True:
            self._lost += 1
            if self._lost > self._restarts:
                raise RuntimeError(f"{error}\n{self._lost} processes of {self._name} were lost without one whole "
                                   "episode between them")
            _log.warning("%s\nits episodes end as truncated; another process takes its place", error)
            try:
                part.replace()
                break
            except LostError as another:
                error = another
        part.cut(self._playing[part.rows])
        self._playing[part.rows] = False

    def _restorable(self, row: int) -> RemoteRows:
        part = next(part for part in self._parts if row < part.rows.stop)
        if not part.process.has_snapshots:
            raise UserError(f"env={self._name} cannot be put back to an earlier state")
        return part

    def _over(self) -> np.ndarray:
        return self._gather(lambda shown: shown.terminated | shown.truncated)

    def _gather(self, get: Callable[[Answers], np.ndarray]) -> np.ndarray:
        """One array of all rows, the caller's to keep."""
        return np.concatenate([get(part.shown) for part in self._parts])

    def _observation(self) -> dict[str, Any]:
        frames = {camera: np.concatenate([part.shown.frames[camera] for part in self._parts])
                  for camera in self.spec.cameras}
        return {"frames": frames, "proprio": self._gather(lambda shown: shown.proprio)}

    def _info(self) -> dict[str, Any]:
        return {"instruction": list(self._instruction), "task": list(self.row_tasks),
                "success": self._gather(lambda shown: shown.success),
                "decided": self._gather(lambda shown: shown.decided),
                "uncertainty": np.zeros(self.num_envs, np.float32), "time": self._gather(lambda shown: shown.time)}
