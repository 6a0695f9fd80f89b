"""What a log's rows become in the store, whatever their format: nobody's tokens, no log-probabilities, no decisions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from data.store import ReplayStore
from data.types import NOT_OURS, UNKNOWN_TOKEN, Behaviour, Source, Statistics, Success, Trajectory


def log_trajectory(
    *, frames: Mapping[str, UInt8[np.ndarray, "r h w 3"]], proprio: Float32[np.ndarray, "r p"],
    action: Float32[np.ndarray, "r a"], shows_success: Bool[np.ndarray, " t"], success: Success,
    timestamp: Float64[np.ndarray, " r"], statistics: Statistics, task: str, instruction: str, embodiment: str,
    provenance: Mapping[str, Any],
) -> Trajectory:
    """``r`` rows become ``t = r - 1`` steps: no observation follows the last action, so it is left out.

    ``action`` is in raw units. ``shows_success``: the task is done in the observation after each step; the first of
    these terminates, or the last step of a success of which no step is marked, or every one. Otherwise the log says
    that it stops there, not that no value follows: truncated.
    """
    steps = len(action) - 1
    scaled = np.clip(statistics.normalise(action[:-1]), -1, 1)
    last = np.arange(steps) == steps - 1
    reward = shows_success.astype(np.float32)
    if success is Success.YES and (not reward.any() or reward.all()):
        reward = last.astype(np.float32)
    terminated = np.arange(steps) == np.argmax(reward) if reward.any() else np.zeros(steps, bool)
    return Trajectory(
        frames=frames, proprio=proprio, action=scaled, reward=reward, terminated=terminated,
        truncated=last & ~terminated.any(), action_token=np.full(scaled.shape, UNKNOWN_TOKEN, np.int16),
        log_prob=np.full(scaled.shape, np.nan, np.float32), decision=np.zeros(steps, bool),
        policy_version=np.full(steps, NOT_OURS, np.int64), uncertainty=np.zeros(steps, np.float32), timestamp=timestamp,
        source=Source.REAL, task=task, instruction=instruction, success=success, behaviour=Behaviour.UNKNOWN,
        embodiment=embodiment, world_model_version=-1, provenance=dict(provenance))


def known_episodes(store: ReplayStore | None) -> set[tuple[str, str]]:
    """Hashes of the bytes and of the configuration of every log episode in the store."""
    provenances = [] if store is None else [store.provenance(index) for index in range(len(store))]
    return {(p["source_sha256"], p["config_sha256"]) for p in provenances if "source_sha256" in p}
