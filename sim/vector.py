"""Simulated tasks behind the ``Env`` contract: many rows, spread over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.types import Source, UserError
from sim.metaworld import MetaWorldConfig
from sim.perturbation import Perturbation
from sim.processes import Local, Remote
from sim.task import Step, TaskConfig, pack, unpack


class VectorEnv:
    """``num_envs`` rows of one simulator; row ``i`` plays ``tasks[i % len(tasks)]``.

    See ``data.types.Env`` for the contract. ``workers`` processes share the rows in contiguous blocks; 0 runs them in
    this process. Which process a row lives in never changes what it plays.
    """

    world_model_version = -1

    def __init__(
        self,
        *,
        tasks: Sequence[str],
        num_envs: int = 8,
        workers: int = 2,
        config: TaskConfig | None = None,
        source: Source | str = Source.SIM,
        only: Sequence[int] | None = None,
    ) -> None:
        """Start the processes and build every task; ``only`` these rows, where the others are played elsewhere.

        ``config`` says which simulator it is; Meta-World by default. ``tasks`` may also be the name of a mix.

        Raises:
            UserError: for an unknown task, an empty list, a source that is not ``sim`` or ``real``, no row, or a
                simulator that is not installed or lacks what it draws with.

        """
        config = MetaWorldConfig() if config is None else config
        self.tasks = _check(tasks, num_envs, workers, source, config)
        self.config, self.source = config, Source(source)
        rows = range(num_envs) if only is None else only
        self.row_tasks = [self.tasks[row % len(self.tasks)] for row in rows]
        self.num_envs = num_envs = len(rows)
        self.spec, self.statistics, self.embodiment = config.spec, config.statistics, config.embodiment
        self.max_episode_steps, self.factors = config.max_episode_steps, config.factors
        self.metadata: dict[str, Any] = {"autoreset_mode": "disabled", "render_fps": self.spec.control_hz}
        self.provenance: Mapping[str, Any] = {
            "simulator": config.prepare(),
            "robot_stand_in": self.source is Source.REAL,
            "config": dataclasses.asdict(config),  # type: ignore[call-overload]  # they are dataclasses
            "clock": "simulated seconds",
        }
        self.elapsed = np.zeros(num_envs, np.int64)
        """Control steps since each row's reset."""
        size = config.spec.image_size if config.spec.cameras else 0
        self._frames = np.zeros((num_envs, size, size, 3), np.uint8)
        self._proprio = np.zeros((num_envs, self.spec.proprio_dim), np.float32)
        self._terminated, self._truncated, self._success, self._decided, self._playing = np.zeros((5, num_envs), bool)
        self._time = np.zeros(num_envs)
        self._instruction = [""] * num_envs
        self._workers: list[Local | Remote] = []
        try:
            blocks = np.array_split(np.arange(num_envs), max(1, min(workers, num_envs)))
            for block in blocks:
                share = {int(row): self.row_tasks[row] for row in block}
                self._workers.append(Remote(share, config) if workers else Local(share, config))
            for worker in self._workers:
                worker.receive()  # all are building at the same time by now
        except BaseException:
            self.close()
            raise

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any]) -> tuple[dict, dict]:
        """Restart the rows of ``options["reset_mask"]`` with ``seed[row]`` (ignored elsewhere)."""
        rows = np.flatnonzero(options["reset_mask"])
        seeds = {int(row): seed[int(row)] for row in rows}
        if any(value is None for value in seeds.values()):
            raise ValueError("every row that is reset needs a seed: it alone decides the episode")
        self._take(self._steps("reset", seeds))
        self.elapsed[rows] = 0
        return self._observation(), self._info()

    def step(
        self, actions: Float32[np.ndarray, "n a"]
    ) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One control step of every row that is playing; parked rows are not touched."""
        rows = np.flatnonzero(self._playing)
        reward = np.zeros(self.num_envs, np.float32)
        answers = self._steps("step", {int(row): actions[row] for row in rows})
        self.elapsed[rows] += 1
        self._take(answers)
        for row, answer in answers.items():
            reward[row] = answer.reward
        return self._observation(), reward, self._terminated.copy(), self._truncated.copy(), self._info()

    def expert_action(self) -> Float32[np.ndarray, "n a"]:
        """Ask what the scripted expert would do in each playing row; zeros in parked ones."""
        actions = np.zeros((self.num_envs, self.spec.action_dim), np.float32)
        for row, action in self._call("expert", dict.fromkeys(np.flatnonzero(self._playing).tolist())).items():
            actions[row] = action
        return actions

    @property
    def perturbation(self) -> Perturbation:
        """What differs in episodes that are reset now."""
        return self.config.perturbation

    def perturb(self, perturbation: Perturbation) -> None:
        """Play every episode that is reset from now on under ``perturbation``, which replaces the configured one.

        Raises:
            UserError: for a factor that this simulator lacks.

        """
        self.config = dataclasses.replace(self.config, perturbation=perturbation)  # type: ignore[type-var]
        self.provenance = {**self.provenance, "config": dataclasses.asdict(self.config)}  # type: ignore[call-overload]
        self._call("perturb", dict.fromkeys(range(self.num_envs), perturbation))

    def snapshot(self, row: int) -> bytes:
        """All that decides what ``row`` does next, for ``restore``. It holds no pickle."""
        return pack(self._call("snapshot", {row: None})[row])

    def restore(self, row: int, snapshot: bytes) -> tuple[dict, dict]:
        """Put ``row`` where ``snapshot`` was taken: what follows is the same, bit for bit; observation and info of all.

        Any row that plays the same task under the same configuration may take it, in any process.

        Raises:
            UserError: for bytes that are no snapshot, or of another task.

        """
        taken = unpack(snapshot)
        if taken["task"] != self.row_tasks[row]:
            raise UserError(f"expected a snapshot of {self.row_tasks[row]} for row {row}, got one of {taken['task']}")
        self._take(self._steps("restore", {row: taken}))
        self.elapsed[row] = taken["progress"]["steps"]
        return self._observation(), self._info()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _steps(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Step]:
        return {row: Step(*answer) for row, answer in self._call(method, arguments).items()}

    def _call(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        """Send each worker its rows' share, then collect: the workers run side by side."""
        if not self._workers:
            raise RuntimeError("this VectorEnv is closed")
        asked = []
        for worker in self._workers:
            share = {row: value for row, value in arguments.items() if row in worker.rows}
            if share:
                worker.send(method, share)
                asked.append(worker)
        answers: dict[int, Any] = {}
        for worker in asked:
            answers |= worker.receive()
        return answers

    def _take(self, answers: Mapping[int, Step]) -> None:
        for row, step in answers.items():
            self._frames[row], self._proprio[row], self._time[row] = step.frame, step.proprio, step.time
            self._terminated[row], self._truncated[row] = step.terminated, step.truncated
            self._success[row], self._decided[row] = step.success, step.decided
            self._instruction[row] = step.instruction
            self._playing[row] = not (step.terminated or step.truncated)

    def _observation(self) -> dict[str, Any]:
        return {"frames": {camera: self._frames.copy() for camera in self.spec.cameras},
                "proprio": self._proprio.copy()}

    def _info(self) -> dict[str, Any]:
        return {"instruction": list(self._instruction), "task": list(self.row_tasks), "success": self._success.copy(),
                "decided": self._decided.copy(), "uncertainty": np.zeros(self.num_envs, np.float32),
                "time": self._time.copy()}


def _check(
    tasks: Sequence[str], num_envs: int, workers: int, source: Source | str, config: TaskConfig
) -> tuple[str, ...]:
    """Return the tasks that ``tasks`` names."""
    if not tasks:
        raise UserError(f"expected a list of tasks, got {tasks!r}; type e.g. env.tasks=[drawer-close-v3]")
    known = config.tasks([tasks] if isinstance(tasks, str) else tasks)
    if str(source) not in (Source.SIM, Source.REAL):
        raise UserError(f"expected source sim or real, got {source!r}")
    if num_envs < len(known) or workers < 0:
        raise UserError(f"expected a row for each of {len(known)} tasks and workers >= 0, got num_envs={num_envs} and "
                        f"workers={workers}; type e.g. env.num_envs={len(known)} env.workers=2")
    return known
