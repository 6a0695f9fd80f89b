"""What every simulated task shares: what it answers, what an episode counts, and snapshots as bytes.

``sim.vector`` puts several tasks behind the ``Env`` contract. Nothing here imports torch, so a process full of them
stays small.
"""

from __future__ import annotations

import difflib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32

from data.types import Spec, Statistics, UserError
from sim.perturbation import Perturbation


class Step(NamedTuple):
    """What one environment answers to ``reset`` or ``step``."""

    frame: np.ndarray
    """``[h, w, 3]`` uint8; empty without pixels."""
    proprio: np.ndarray
    """``[p]`` float32."""
    reward: float
    terminated: bool
    truncated: bool
    success: bool
    decided: bool
    """It has succeeded, now or before; with a dense reward nothing is ever decided."""
    time: float
    """Simulated seconds since the reset."""
    instruction: str


class Task(Protocol):
    """One environment that plays one task."""

    def reset(self, seed: int) -> Step:
        """Start the episode that ``seed`` names; all that follows depends on it alone."""
        ...

    def step(self, action: np.ndarray) -> Step:
        """Play one control step under the normalised action ``[a]``."""
        ...

    def expert_action(self) -> np.ndarray:
        """Answer the scripted expert's action ``[a]`` for the present state, within [-1, 1]."""
        ...

    def perturb(self, perturbation: Perturbation) -> None:
        """From the next reset on."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """All that decides what comes next: arrays, and what JSON can hold."""
        ...

    def restore(self, snapshot: Mapping[str, Any]) -> Step:
        """Go back to where ``snapshot`` was taken, here or by another task of the same kind; its step again."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class TaskConfig(Protocol):
    """How a kind of simulator is set up: what ``sim.vector.VectorEnv`` asks of it."""

    @property
    def max_episode_steps(self) -> int:
        """Control steps until an episode is truncated."""
        ...

    @property
    def perturbation(self) -> Perturbation:
        """Fixed for every episode."""
        ...

    @property
    def spec(self) -> Spec:
        """What its rows show and take."""
        ...

    @property
    def statistics(self) -> Statistics:
        """Of its actions and proprio."""
        ...

    @property
    def embodiment(self) -> str:
        """Which body acts."""
        ...

    @property
    def factors(self) -> frozenset[str]:
        """What of ``Perturbation`` it has."""
        ...

    def tasks(self, names: Iterable[str]) -> tuple[str, ...]:
        """Tasks by name, with the names of mixes replaced by theirs. UserError for one that is not known."""
        ...

    def prepare(self) -> str:
        """Say name and version of the simulator, once it can be imported. UserError where it cannot."""
        ...

    def make(self, task: str) -> Task:
        """Build one environment, in the process that plays it."""
        ...


@dataclass
class Progress:
    """What an episode counts."""

    waiting: Float32[np.ndarray, "latency a"]
    """Actions that were commanded and not yet executed."""
    left: int
    """Control steps that it may go on after its success."""
    limit: int
    """Control steps until it is truncated."""
    seed: int
    steps: int = 0
    succeeded: bool = False
    reward: float = 0.0
    """Of the last step."""

    def delay(self, action: np.ndarray) -> np.ndarray:
        """Count a control step; the action that it executes, while ``action`` waits its turn."""
        self.steps += 1
        waiting = np.concatenate([self.waiting, np.clip(action, -1, 1)[None]])
        self.waiting = waiting[1:]
        return waiting[0]

    def note(self, done: bool) -> None:
        """Take down whether the task is done after this step, which pays 1 for it."""
        self.left -= self.succeeded
        self.succeeded |= done
        self.reward = float(done)

    def flags(self, *, decides: bool = True) -> dict[str, bool]:
        """``terminated, truncated, success, decided`` of a ``Step``; ``decides``: whether success ends an episode."""
        decided, last = self.succeeded and decides, self.steps >= self.limit
        return {"terminated": decided and (last or self.left <= 0), "truncated": last and not decided,
                "success": self.succeeded, "decided": decided}


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise a UserError with the nearest known name unless ``name`` is one of ``known``."""
    known = tuple(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3) or known[:1]
        raise UserError(f"unknown {kind} {name!r}, did you mean {near[0]!r}?")


def check_counts(config: Any) -> None:
    """Raise a UserError for sizes and lengths that make no episode."""
    for name in ("image_size", "max_episode_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.steps_after_success < 0:
        raise UserError(f"steps_after_success must be at least 0, got {config.steps_after_success}")


def pack(snapshot: Mapping[str, Any]) -> bytes:
    """Arrays as NumPy's npz, the rest as JSON within it."""
    arrays = {name: value for name, value in snapshot.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in snapshot.items() if name not in arrays}
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
    return file.getvalue()


def unpack(content: bytes) -> dict[str, Any]:
    """Inverse of ``pack``; loads no pickle. UserError for bytes that are no snapshot."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return {**json.loads(arrays.pop("facts").tobytes()), **arrays}
    except (ValueError, OSError, KeyError) as error:
        raise UserError("expected the bytes of a snapshot, got others; take one with env.snapshot(row)") from error
