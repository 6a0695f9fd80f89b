"""What crosses package borders: one type per stage, none of them optional.

``Trajectory`` is what was recorded (NumPy, one row per control step). ``Env`` and ``Policy`` are the two protocols that
let ``sim`` evaluate and ``world_model`` imagine with a policy without importing ``wm_rl``. What learners read is in
``data.batches``: nothing here imports torch, which takes seconds and which logs do not need.

Axes used everywhere: ``b`` batch, ``t`` control steps, ``d`` decisions, ``k`` actions in a chunk, ``a`` action
dimensions, ``p`` proprio dimensions, ``n`` environments, ``h w`` pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int16, Int64, UInt8

UNKNOWN_TOKEN = -1
"""``action_token`` of a step that nobody tokenised."""

NOT_OURS = -1
"""``policy_version`` of a step that a human, a script or another policy acted."""


class UserError(Exception):
    """Bad input. Its text is one line: what was expected, what came, what to type. Commands print it and exit 2."""


class Source(StrEnum):
    """Where a trajectory comes from."""

    SIM = "sim"
    REAL = "real"
    IMAGINED = "imagined"


class Behaviour(StrEnum):
    """What is known of the policy that acted: its ``log_prob`` was recorded, estimated by a clone, or is unknown."""

    LOGGED = "logged"
    CLONED = "cloned"
    UNKNOWN = "unknown"


class Success(StrEnum):
    """Outcome of a trajectory. Unknown stays unknown."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What maps raw robot units to what a policy sees, versioned by ``fingerprint``.

    ``action = 2 (raw - action_low) / (action_high - action_low) - 1``; a policy standardises ``proprio`` by its mean
    and standard deviation.
    """

    action_low: Float32[np.ndarray, " a"]
    action_high: Float32[np.ndarray, " a"]
    proprio_mean: Float32[np.ndarray, " p"]
    proprio_std: Float32[np.ndarray, " p"]

    def normalise(self, raw: Float32[np.ndarray, "*t a"]) -> Float32[np.ndarray, "*t a"]:
        """Raw actions to [-1, 1]. A dimension without range maps to 0."""
        span = self.action_high - self.action_low
        scaled = 2 * (raw - self.action_low) / np.where(span > 0, span, 1) - 1
        return np.where(span > 0, scaled, 0).astype(np.float32)

    def denormalise(self, action: Float32[np.ndarray, "*t a"]) -> Float32[np.ndarray, "*t a"]:
        """Inverse of ``normalise``."""
        span = self.action_high - self.action_low
        return (self.action_low + (action + 1) / 2 * span).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Their version: 12 hexadecimal digits of the SHA-256 of the exact values."""
        digest = hashlib.sha256()
        for field in dataclasses.fields(self):
            values = np.asarray(getattr(self, field.name) + np.float32(0), "<f4")  # -0 is 0
            digest.update(f"{field.name} {len(values)} ".encode() + values.tobytes())
        return digest.hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and the fingerprint, for JSON and checkpoints; float32 survives the round trip exactly."""
        values = {field.name: getattr(self, field.name).tolist() for field in dataclasses.fields(self)}
        return {**values, "fingerprint": self.fingerprint}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Statistics:
        """Inverse of ``to_dict``. Raises ``UserError`` when the values are not those of the fingerprint beside them."""
        made = Statistics(**{key: np.asarray(value, np.float32) for key, value in values.items()
                             if key != "fingerprint"})
        if made.fingerprint != values.get("fingerprint", made.fingerprint):
            raise UserError(f"the normalisation statistics have changed since they were written: their fingerprint is "
                            f"{values['fingerprint']}, their values have {made.fingerprint}; restore the file")
        return made

    def same_as(self, other: Statistics) -> bool:
        """True when both map the same raw values to the same normalised ones."""
        return self.fingerprint == other.fingerprint

    def check_same(self, other: Statistics, *, mine: str, theirs: str) -> None:
        """Raise ``UserError`` unless both are the same; ``mine`` and ``theirs`` say of what they are."""
        if not self.same_as(other):
            raise UserError(f"the normalisation statistics of {theirs} ({other.fingerprint}) do not match those of "
                            f"{mine} ({self.fingerprint}): it would read and command wrong units; use what {mine} was "
                            "made with, or make a new one for these")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an environment, a store and a policy must agree on."""

    cameras: tuple[str, ...]
    image_size: int
    """Frames are square, in pixels."""
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    control_hz: float
    """Control steps per second."""

    @property
    def proprio_dim(self) -> int:
        """Length of ``proprio``."""
        return len(self.proprio_names)

    @property
    def action_dim(self) -> int:
        """Length of ``action``."""
        return len(self.action_names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return {**dataclasses.asdict(self), "cameras": list(self.cameras),
                "proprio_names": list(self.proprio_names), "action_names": list(self.action_names)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Spec:
        """Inverse of ``to_dict``."""
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return Spec(**plain)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One recorded episode of ``t`` control steps (``t1`` = t + 1 observations), independent of any chunk length.

    ``log_prob`` is that of each action token under the policy that acted; NaN means unknown and is never invented.
    ``decision`` is true where the policy looked and issued a chunk. ``terminated``: the episode is decided and no value
    follows; steps after it are its aftermath (``data.outcome``), which holds no decision and no return.
    ``truncated``: bootstrap from the last observation. ``uncertainty`` is 0 where nothing was imagined.
    ``timestamp`` is in seconds since the episode began, on the clock that ``provenance`` names.
    """

    frames: Mapping[str, UInt8[np.ndarray, "t1 h w 3"]]
    proprio: Float32[np.ndarray, "t1 p"]
    action: Float32[np.ndarray, "t a"]
    action_token: Int16[np.ndarray, "t a"]
    log_prob: Float32[np.ndarray, "t a"]
    decision: Bool[np.ndarray, " t"]
    reward: Float32[np.ndarray, " t"]
    terminated: Bool[np.ndarray, " t"]
    truncated: Bool[np.ndarray, " t"]
    policy_version: Int64[np.ndarray, " t"]
    uncertainty: Float32[np.ndarray, " t"]
    timestamp: Float64[np.ndarray, " t1"]
    source: Source
    task: str
    """Name of the task, e.g. ``drawer-close-v3``; for logs without one, the instruction."""
    instruction: str
    """The sentence that the policy was given."""
    success: Success
    behaviour: Behaviour
    embodiment: str
    world_model_version: int
    """-1 where nothing was imagined."""
    provenance: Mapping[str, Any]
    """JSON-able: where it came from (file hash, config hash, episode index, clock, seed)."""

    def __len__(self) -> int:
        """Number of control steps ``t``."""
        return len(self.action)

    def __post_init__(self) -> None:
        """Refuse rows that do not line up: a torn trajectory must not reach a store."""
        steps = len(self.action)
        if steps == 0:
            raise ValueError("a trajectory needs at least one control step, got none")
        for name in ("action_token", "log_prob", "decision", "reward", "terminated", "truncated",
                     "policy_version", "uncertainty"):
            if len(getattr(self, name)) != steps:
                raise ValueError(f"{name} has {len(getattr(self, name))} rows, expected {steps} like action")
        observed = {"proprio": self.proprio, "timestamp": self.timestamp, **self.frames}
        for name, rows in observed.items():
            if len(rows) != steps + 1:
                raise ValueError(f"{name} has {len(rows)} rows, expected {steps + 1}: one more than the actions")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a policy looks at, one row per environment."""

    frames: Mapping[str, UInt8[np.ndarray, "n h w 3"]]
    proprio: Float32[np.ndarray, "n p"]
    instruction: Sequence[str]
    slot: Sequence[int]
    """Which row of its Env each row is: what a policy with memory keys its state by."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a policy answers. ``log_prob`` is that of ``token`` under the distribution it was drawn from."""

    token: Int16[np.ndarray, "n k a"]
    action: Float32[np.ndarray, "n k a"]
    """Normalised to [-1, 1]."""
    log_prob: Float32[np.ndarray, "n k a"]
    value: Float32[np.ndarray, " n"]


@runtime_checkable
class Env(Protocol):
    """A vector of ``num_envs`` environments in Gymnasium's vector conventions, autoreset mode ``DISABLED``.

    The caller resets: ``reset(seed=[...], options={"reset_mask": bool [n]})`` restarts only the masked rows, and
    ``seed[i]`` alone decides the episode that row ``i`` plays (same seed, same episode, in any order, in any
    process). A row whose episode is over is *parked*: ``step`` ignores its action, repeats its last observation with
    reward 0 and its last flags, and costs nothing. An observation is
    ``{"frames": {camera: uint8 [n, h, w, 3]}, "proprio": float32 [n, p]}``; rows not yet reset hold zeros.
    ``info`` of ``reset`` and ``step`` holds for every row ``"instruction"`` (list of str), ``"task"`` (list of str),
    ``"success"`` (bool [n]), ``"uncertainty"`` (float32 [n]) and ``"time"`` (float64 [n], seconds since the reset).
    Where episodes begin in stored ones, ``"branch"`` holds a JSON-able mapping per row that says where. Where rows play
    on after their episode is decided, ``"decided"`` (bool [n]) says so, from the deciding step on.
    The arrays returned are the caller's to keep.
    """

    num_envs: int
    spec: Spec
    statistics: Statistics
    source: Source
    embodiment: str
    max_episode_steps: int
    metadata: dict[str, Any]
    provenance: Mapping[str, Any]
    """JSON-able facts that every trajectory recorded here carries (simulator, versions, configuration)."""
    world_model_version: int
    """-1 unless this is imagination."""

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any]) -> tuple[dict, dict]:
        """Restart the rows of ``options["reset_mask"]``; returns observation and info of all rows."""
        ...

    def step(
        self, actions: Float32[np.ndarray, "n a"]
    ) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Normalised actions, one control step: observation, reward, terminated, truncated, info."""
        ...

    def close(self) -> None:
        """Release processes and GL contexts. May be called twice."""
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """An Env that works ahead when it hears what a row is about to do."""

    def foresee(self, row: int, actions: np.ndarray) -> None:
        """Actions ``float32 [n, a]`` that ``row`` takes in its next ``n`` steps, unless its episode ends before."""
        ...


@runtime_checkable
class Normalised(Protocol):
    """Anything that knows by which statistics it reads and commands."""

    statistics: Statistics


@runtime_checkable
class Policy(Protocol):
    """Anything that acts: a VLA, or a scripted expert behind the same face."""

    chunk: int
    """Actions per decision, ``k``."""
    version: int
    """Number of gradient updates it has had; ``NOT_OURS`` for what we did not train."""

    def act(self, observation: Observation, seeds: Sequence[int] | None) -> Action:
        """Choose a chunk for each row. Row ``i`` draws its randomness from ``seeds[i]`` alone; ``None`` is greedy."""
        ...
