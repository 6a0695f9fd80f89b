"""Meta-World behind the ``Env`` contract: many rows, spread over processes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.types import Source, Spec, Statistics, UserError
from sim.gl import ensure_gl
from sim.metaworld import ACTIONS, PROPRIO, STATE, MetaWorldConfig, Perturbation, Step, check_name
from sim.tasks import TASKS

EMBODIMENT = "metaworld-sawyer"

STATISTICS = Statistics(
    action_low=np.full(4, -1, np.float32),
    action_high=np.full(4, 1, np.float32),
    proprio_mean=np.array([0.0, 0.6, 0.2, 0.6], np.float32),
    proprio_std=np.array([0.1, 0.12, 0.1, 0.35], np.float32),
)
"""Meta-World's actions are normalised already; proprio is scaled by the size of the workspace. Fixed, so that the
simulator and the robot stand-in share one store."""

_SCALES = {"x_m": (0.0, 0.15), "y_m": (0.6, 0.15), "z_m": (0.2, 0.15), "fraction": (0.6, 0.35)}
"""Mean and deviation of a state by the end of its name; quaternions stay as they are."""
_MEAN, _STD = np.array([next((scale for end, scale in _SCALES.items() if name.endswith(end)), (0.0, 1.0))
                        for name in STATE], np.float32).T
STATE_STATISTICS = Statistics(action_low=STATISTICS.action_low, action_high=STATISTICS.action_high,
                              proprio_mean=_MEAN.copy(), proprio_std=_STD.copy())
"""Of Meta-World's own observation."""


class VectorEnv:
    """``num_envs`` rows of Meta-World; row ``i`` plays ``tasks[i % len(tasks)]``.

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
        config: MetaWorldConfig | None = None,
        source: Source | str = Source.SIM,
        only: int | None = None,
    ) -> None:
        """Start the processes and build every task; ``only`` that row of them, where each is played by itself.

        Raises:
            UserError: for an unknown task, an empty list, a source that is not ``sim`` or ``real``, no row, a machine
                without GL, or Meta-World not installed.

        """
        config = MetaWorldConfig() if config is None else config
        _check(tasks, num_envs, workers, source)
        pixels = config.observation == "pixels"
        try:
            ensure_gl()  # before MuJoCo is imported, even if this environment does not draw: the next one may
        except UserError:
            if pixels:
                raise
        self.config, self.source, self.tasks = config, Source(source), tuple(tasks)
        rows = range(num_envs) if only is None else [only]
        self.row_tasks = [self.tasks[row % len(self.tasks)] for row in rows]
        self.num_envs = num_envs = len(rows)
        self.spec = Spec(cameras=(config.camera,) if pixels else (), image_size=config.image_size,
                         proprio_names=PROPRIO if pixels else STATE, action_names=ACTIONS, control_hz=config.control_hz)
        self.statistics = STATISTICS if pixels else STATE_STATISTICS
        self.embodiment = EMBODIMENT
        self.max_episode_steps = config.max_episode_steps
        self.metadata: dict[str, Any] = {"autoreset_mode": "disabled", "render_fps": config.control_hz}
        self.provenance: Mapping[str, Any] = {
            "simulator": f"metaworld {_version('metaworld')}, mujoco {_version('mujoco')}",
            "robot_stand_in": config.perturbation != Perturbation(),
            "config": dataclasses.asdict(config),
            "clock": "simulated seconds",
        }
        self.elapsed = np.zeros(num_envs, np.int64)
        """Control steps since each row's reset."""
        size = config.image_size if pixels else 0
        self._frames = np.zeros((num_envs, size, size, 3), np.uint8)
        self._proprio = np.zeros((num_envs, self.spec.proprio_dim), np.float32)
        self._terminated, self._truncated, self._success, self._decided, self._playing = np.zeros((5, num_envs), bool)
        self._time = np.zeros(num_envs)
        self._instruction = [""] * num_envs
        self._workers: list[_Local | _Remote] = []
        try:
            blocks = np.array_split(np.arange(num_envs), max(1, min(workers, num_envs)))
            for block in blocks:
                share = {int(row): self.row_tasks[row] for row in block}
                self._workers.append(_Remote(share, config) if workers else _Local(share, config))
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
        self._take(self._call("reset", seeds))
        self.elapsed[rows] = 0
        return self._observation(), self._info()

    def step(
        self, actions: Float32[np.ndarray, "n a"]
    ) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """One control step of every row that is playing; parked rows are not touched."""
        rows = np.flatnonzero(self._playing)
        reward = np.zeros(self.num_envs, np.float32)
        answers = self._call("step", {int(row): actions[row] for row in rows})
        self.elapsed[rows] += 1
        self._take(answers)
        for row, answer in answers.items():
            reward[row] = answer.reward
        return self._observation(), reward, self._terminated.copy(), self._truncated.copy(), self._info()

    def expert_action(self) -> Float32[np.ndarray, "n a"]:
        """Ask what Meta-World's scripted expert would do in each playing row; zeros in parked ones."""
        actions = np.zeros((self.num_envs, len(ACTIONS)), np.float32)
        rows = {int(row): None for row in np.flatnonzero(self._playing)}
        for row, action in self._call("expert", rows, raw=True).items():
            actions[row] = action
        return actions

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def _call(self, method: str, arguments: Mapping[int, Any], *, raw: bool = False) -> dict[int, Any]:
        """Send each worker its rows' share, then collect: the workers run side by side."""
        if not self._workers:
            raise RuntimeError("this VectorEnv is closed")
        asked = []
        for worker in self._workers:
            share = {row: value for row, value in arguments.items() if row in worker.rows}
            if share:
                worker.send(method, list(share) if method == "expert" else share)
                asked.append(worker)
        answers: dict[int, Any] = {}
        for worker in asked:
            answers |= worker.receive()
        return answers if raw else {row: Step(*answer) for row, answer in answers.items()}

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


class _Local:
    """Rows in this process."""

    def __init__(self, rows: Mapping[int, str], config: MetaWorldConfig) -> None:
        from sim.worker import Rows

        self.rows, self._answer = rows, None
        self._rows = Rows(rows, config)

    def send(self, method: str, argument: Any) -> None:
        self._answer = getattr(self._rows, method)(argument)

    def receive(self) -> Any:
        return self._answer

    def close(self) -> None:
        self._rows.close()


class _Remote:
    """Rows in a process of their own."""

    def __init__(self, rows: Mapping[int, str], config: MetaWorldConfig) -> None:
        self.rows = rows
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {"OMP_NUM_THREADS": "1", "LP_NUM_THREADS": "0"}  # processes are the parallelism
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sim.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **threads, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        self.send("make", (dict(rows), config))

    def send(self, method: str, argument: Any) -> None:
        try:
            self._connection.send((method, argument))
        except OSError as error:
            raise self._died() from error

    def receive(self) -> Any:
        try:
            status, result = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error
        if status == "error":
            raise RuntimeError(f"the simulation process of {self._who()} failed:\n{result}")
        return result

    def close(self) -> None:
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _who(self) -> str:
        return f"rows {min(self.rows)}-{max(self.rows)} ({', '.join(sorted(set(self.rows.values())))})"

    def _died(self) -> RuntimeError:
        try:
            code: int | str = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = "unknown"
        return RuntimeError(f"the simulation process of {self._who()} died (exit code {code}; -9 is often memory)")


def _check(tasks: Sequence[str], num_envs: int, workers: int, source: Source | str) -> None:
    if isinstance(tasks, str) or not tasks:
        raise UserError(f"expected a list of tasks, got {tasks!r}; type e.g. env.tasks=[drawer-close-v3]")
    for task in tasks:
        check_name("task", task, TASKS)
    if str(source) not in (Source.SIM, Source.REAL):
        raise UserError(f"expected source sim or real, got {source!r}")
    if num_envs < len(tasks) or workers < 0:
        raise UserError(f"expected a row for each of {len(tasks)} tasks and workers >= 0, got num_envs={num_envs} and "
                        f"workers={workers}; type e.g. env.num_envs={len(tasks)} env.workers=2")
    if importlib.util.find_spec("metaworld") is None or importlib.util.find_spec("mujoco") is None:
        raise UserError("expected Meta-World, which is not installed; type: pip install 'wm-rl[metaworld]'")


def _version(package: str) -> str:
    return importlib.metadata.version(package)
