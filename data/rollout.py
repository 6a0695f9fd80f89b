"""Play a ``Policy`` in an ``Env`` and record ``Trajectory`` objects.

The one loop in which anything acts: simulators, the robot stand-in, imagination, experts and learned policies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data.types import Behaviour, Env, Foreseeing, Normalised, Observation, Policy, Success, Trajectory


def decision_seed(seed: int, decision: int) -> int:
    """Return the policy's randomness for one decision of one episode: 63 bits that depend on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{decision}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rollout(
    env: Env,
    policy: Policy,
    seeds: Sequence[Iterable[int | None]],
    *,
    sample: bool,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Trajectory]:
    """Play episodes and yield each as it ends; episodes that end together come in row order.

    A row starts its next episode as soon as one ends and parks after its last. What an episode holds depends on its
    seed alone, not on its row, its neighbours or the number of processes, as far as the policy computes each row of
    a batch alike.

    Args:
        env: Where to play.
        policy: Who acts. It is asked only for rows whose chunk has run out.
        seeds: ``seeds[i]`` are the episodes that row ``i`` plays in turn; may be empty. None is "not now": the row is
            asked again after the next control step of another one.
        sample: Draw actions (True) or take the greedy ones.
        on_step: Called after each control step with the number of rows that played it.

    Raises:
        ValueError: when ``seeds`` has not one entry per row.
        UserError: when the policy was made with other statistics than the environment has.

    """
    if len(seeds) != env.num_envs:
        raise ValueError(f"expected a list of seeds for each of {env.num_envs} rows, got {len(seeds)}")
    if isinstance(policy, Normalised):
        policy.statistics.check_same(env.statistics, mine="the policy", theirs="the environment")
    waiting = [iter(row) for row in seeds]
    playing: dict[int, _Recorder] = {}
    while True:
        starting = {row: seed for row, left in enumerate(waiting)
                    if row not in playing and (seed := next(left, None)) is not None}
        if starting:
            mask = np.isin(np.arange(env.num_envs), list(starting))
            next_seeds = [starting.get(row) for row in range(env.num_envs)]
            observation, info = env.reset(seed=next_seeds, options={"reset_mask": mask})
            for row, seed in starting.items():
                playing[row] = _Recorder(env, row, seed, observation, info)
        if not playing:
            return
        _decide(env, policy, playing, observation, info, sample=sample)
        actions = np.zeros((env.num_envs, env.spec.action_dim), np.float32)
        for row, recorder in playing.items():
            actions[row] = recorder.next_action()
        observation, reward, terminated, truncated, info = env.step(actions)
        if on_step is not None:
            on_step(len(playing))
        for row in sorted(playing):
            playing[row].record(observation, reward, terminated, truncated, info)
            if terminated[row] or truncated[row]:
                yield playing.pop(row).finish()


def _decide(
    env: Env, policy: Policy, playing: dict[int, _Recorder], observation: dict, info: dict, *, sample: bool
) -> None:
    """Ask the policy for a chunk for every row that has none left."""
    rows = [row for row in sorted(playing) if not playing[row].chunk]
    if not rows:
        return
    looked = Observation(
        frames={camera: frames[rows] for camera, frames in observation["frames"].items()},
        proprio=observation["proprio"][rows],
        instruction=[info["instruction"][row] for row in rows],
        slot=rows,
    )
    action = policy.act(looked, [playing[row].decision_seed() for row in rows] if sample else None)
    for index, row in enumerate(rows):
        clipped = np.clip(action.action[index], -1, 1).astype(np.float32)
        playing[row].take(clipped, action.token[index], action.log_prob[index], policy.version)
        if isinstance(env, Foreseeing):
            env.foresee(row, clipped)


class _Recorder:
    """One episode being played."""

    def __init__(self, env: Env, row: int, seed: int, observation: dict, info: dict) -> None:
        self._env, self._row, self._seed = env, row, seed
        self._task, self._instruction = info["task"][row], info["instruction"][row]
        self._branch = info["branch"][row] if "branch" in info else {}
        self._decisions = 0
        self._success = self._decided = False
        self._columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._frames: dict[str, list[np.ndarray]] = {camera: [] for camera in observation["frames"]}
        self._proprio: list[np.ndarray] = []
        self._timestamp: list[float] = []
        self.chunk: list[tuple[np.ndarray, np.ndarray, np.ndarray, bool, int]] = []
        self._observe(observation, info)

    def decision_seed(self) -> int:
        return decision_seed(self._seed, self._decisions)

    def take(self, action: np.ndarray, token: np.ndarray, log_prob: np.ndarray, version: int) -> None:
        """Queue a chunk ``[k, a]``; its first action is the decision."""
        decides = not self._decided
        self._decisions += 1
        self.chunk = [(action[i], token[i], log_prob[i], i == 0 and decides, version) for i in range(len(action))]

    def next_action(self) -> np.ndarray:
        step = self.chunk.pop(0)
        for name, value in zip(("action", "action_token", "log_prob", "decision", "policy_version"), step, strict=True):
            self._columns[name].append(value)
        return step[0]

    def record(self, observation: dict, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray,
               info: dict) -> None:
        row = self._row
        decided = terminated[row] or ("decided" in info and info["decided"][row])
        for name, value in (("reward", reward[row]), ("terminated", decided and not self._decided),
                            ("truncated", truncated[row]), ("uncertainty", info["uncertainty"][row])):
            self._columns[name].append(value)
        self._decided = decided
        self._success = bool(info["success"][row])
        self._observe(observation, info)

    def finish(self) -> Trajectory:
        columns = {name: np.asarray(self._columns[name], dtype) for name, dtype in _COLUMNS.items()}
        logged = bool(np.isfinite(columns["log_prob"]).all())
        return Trajectory(
            frames={camera: np.stack(frames) for camera, frames in self._frames.items()},
            proprio=np.stack(self._proprio).astype(np.float32),
            timestamp=np.asarray(self._timestamp, np.float64),
            **columns,
            source=self._env.source,
            task=self._task,
            instruction=self._instruction,
            success=Success.YES if self._success else Success.NO,
            behaviour=Behaviour.LOGGED if logged else Behaviour.UNKNOWN,
            embodiment=self._env.embodiment,
            world_model_version=self._env.world_model_version,
            provenance={**self._env.provenance, **self._branch, "seed": self._seed},
        )

    def _observe(self, observation: dict, info: dict) -> None:
        for camera, frames in observation["frames"].items():
            self._frames[camera].append(frames[self._row])
        self._proprio.append(observation["proprio"][self._row])
        self._timestamp.append(info["time"][self._row])


_COLUMNS = {"action": np.float32, "action_token": np.int16, "log_prob": np.float32, "decision": bool,
            "reward": np.float32, "terminated": bool, "truncated": bool, "policy_version": np.int64,
            "uncertainty": np.float32}
