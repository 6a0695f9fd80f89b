"""Scripted experts as a ``Policy``, with bursts of noise that make demonstrations cover mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.types import NOT_OURS, UNKNOWN_TOKEN, Action, Observation, UserError
from sim.vector import VectorEnv


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """How often and how long a demonstration goes astray."""

    burst_probability: float = 0.1
    """Chance per control step that a burst of uniformly random actions begins."""
    burst_steps: tuple[int, int] = (2, 5)
    """Shortest and longest burst, in control steps."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "burst_steps", tuple(self.burst_steps))
        low, high = self.burst_steps
        if not 0 <= self.burst_probability <= 1 or not 1 <= low <= high:
            raise UserError(f"expected burst_probability in [0, 1] and 1 <= shortest <= longest burst, got {self}")


class ScriptedExpert:
    """Acts in ``env`` by the expert of each row's task. It looks at the simulator's state, not at the picture."""

    chunk = 1
    version = NOT_OURS

    def __init__(self, env: VectorEnv, config: ExpertConfig | None = None) -> None:
        self._env = env
        self._config = ExpertConfig() if config is None else config
        self._left = np.zeros(env.num_envs, np.int64)
        """Steps that are left of each row's burst."""

    def act(self, observation: Observation, seeds: Sequence[int] | None) -> Action:
        """Answer the expert's action, or a random one inside a burst; no noise when ``seeds`` is None."""
        rows = np.asarray(observation.slot)
        action = self._env.expert_action()[rows]
        if seeds is not None:
            for index, (row, seed) in enumerate(zip(rows, seeds, strict=True)):
                self._disturb(action[index], row, np.random.Generator(np.random.Philox(key=seed)))
        shape = (len(rows), 1, action.shape[1])
        return Action(
            token=np.full(shape, UNKNOWN_TOKEN, np.int16),
            action=action[:, None],
            log_prob=np.full(shape, np.nan, np.float32),
            value=np.full(len(rows), np.nan, np.float32),
        )

    def _disturb(self, action: np.ndarray, row: int, random: np.random.Generator) -> None:
        """Overwrite ``action`` while a burst lasts. A burst ends with its episode."""
        if self._env.elapsed[row] == 0:
            self._left[row] = 0
        low, high = self._config.burst_steps
        starts, length = random.random() < self._config.burst_probability, random.integers(low, high + 1)
        if self._left[row] == 0 and starts:
            self._left[row] = length
        if self._left[row] > 0:
            self._left[row] -= 1
            action[:] = random.uniform(-1, 1, len(action))
