"""One objective on one Meta-World task from stale replay: the loop's learner and store, state instead of pictures.

What a run gives depends on its settings alone, to the last bit, however many others run beside it.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from data.batches import to_torch
from data.rollout import rollout
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from data.types import Source, UserError
from sim.metaworld import MetaWorldConfig
from sim.vector import VectorEnv
from wm_rl.learner import Learner, LearnerConfig
from wm_rl.objectives import Objective
from wm_rl.seeding import training_episode
from wm_rl.staleness import BUCKETS, PANEL
from wm_rl.state_policy import StatePolicy, StatePolicyConfig
from wm_rl.trust import Trust


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all runs of a benchmark share."""

    episodes_per_iteration: int
    windows: int
    decisions: int
    """Of a window; a batch has ``windows · decisions``."""
    discount: float
    action_repeat: int
    max_episode_steps: int
    policy: StatePolicyConfig
    learner: LearnerConfig
    last: int
    """Iterations at the end whose episodes are the result."""
    one_goal: bool = True
    """One goal per task and seed; false: every episode draws its own."""

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        for name in ("episodes_per_iteration", "last"):
            if getattr(self, name) < 1:
                raise UserError(f"experiment.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How stale the replay gets."""

    iterations: int
    updates_per_iteration: int
    """Gradient updates after the episodes of an iteration."""
    capacity: int
    """Newest episodes that may be drawn."""

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        for name in ("iterations", "updates_per_iteration", "capacity"):
            if getattr(self, name) < 1:
                raise UserError(f"a regime's {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """An objective, and how far it trusts."""

    objective: Objective
    trust: Trust = field(default_factory=Trust)


def train_stale(
    experiment: Experiment, regime: Regime, contestant: Contestant, *, task: str, seed: int, scratch: Path
) -> dict[str, Any]:
    """Train from scratch; numbers and curves.

    ``return`` is the mean reward per control step, of at most 1. ``scratch`` takes the store while it runs.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        return _train(experiment, regime, contestant, task, seed, Path(folder) / "replay.zarr")


def _train(
    experiment: Experiment, regime: Regime, contestant: Contestant, task: str, seed: int, path: Path
) -> dict[str, Any]:
    rows = experiment.episodes_per_iteration
    env = VectorEnv(tasks=[task], num_envs=rows, workers=0, config=MetaWorldConfig(
        observation="state", reward="dense", goal_seed=seed if experiment.one_goal else None,
        action_repeat=experiment.action_repeat, max_episode_steps=experiment.max_episode_steps))
    store = ReplayStore.create(path, spec=env.spec, statistics=env.statistics, embodiment=env.embodiment)
    torch.manual_seed(seed)
    policy, reference = (StatePolicy(experiment.policy, spec=env.spec, statistics=env.statistics, seed=seed)
                         for _ in range(2))
    learner = Learner(experiment.learner, fabric=Fabric(accelerator="cpu", devices=1), policy=policy,
                      reference=reference, objective=contestant.objective, trust=contestant.trust)
    sampler = DecisionSampler(store, ReplayConfig(
        windows=experiment.windows, decisions=experiment.decisions, discount=experiment.discount,
        mix={source.value: float(source is Source.SIM) for source in Source},
        capacity={source.value: regime.capacity for source in Source}), chunk=policy.chunk, seed=seed)
    curve: list[dict[str, float]] = []
    updates: list[dict[str, float]] = []
    for iteration in range(regime.iterations):
        seeds = [[training_episode(seed, "collect", iteration, row)] for row in range(rows)]
        played = list(rollout(env, policy, seeds, sample=True))
        store.append(played)
        curve.append({"return": float(np.mean([t.reward.mean() for t in played])),
                      "success": float(np.mean([t.success == "yes" for t in played]))})
        first = iteration * regime.updates_per_iteration
        for step in range(first, first + regime.updates_per_iteration):
            batch = to_torch(sampler.sample(step, version=policy.version), torch.device("cpu"))
            updates.append(learner.update(batch))
    env.close()
    store.close()
    tail = curve[-experiment.last:]
    return {
        "return": float(np.mean([row["return"] for row in tail])),
        "success": float(np.mean([row["success"] for row in tail])),
        "episodes_to_80": _episodes_to(0.8, [row["success"] for row in curve], rows),
        "curve": {name: [row[name] for row in curve] for name in ("return", "success")},
        **_staleness(updates[-experiment.last * regime.updates_per_iteration:])}


def _episodes_to(level: float, success: list[float], rows: int, window: int = 5) -> int | None:
    """Episodes until the mean success of ``window`` iterations reached ``level``; None: never."""
    means = np.convolve(success, np.ones(window) / window, mode="valid")
    reached = np.flatnonzero(means >= level - 1e-9)
    return int((reached[0] + window) * rows) if len(reached) else None


def _staleness(updates: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Token-weighted means over the last updates, the objective's own and what others would have used."""
    weight: dict[str, float] = defaultdict(float)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in updates:
        for bucket in BUCKETS:
            tokens = row.get(f"staleness/{bucket}/tokens", 0.0)
            if not tokens:
                continue
            weight[bucket] += tokens
            for name in ("lag", "utilisation", "effective_sample_share", "abs_log_ratio_p95"):
                sums[bucket][name] += tokens * row[f"staleness/{bucket}/{name}"]
            for other in PANEL:
                for name in ("utilisation", "effective_sample_share"):
                    sums[bucket][f"{other}/{name}"] += tokens * row[f"counterfactual/{other}/{bucket}/{name}"]
    total = sum(weight.values())
    means = {name: sum(sums[bucket][name] for bucket in weight) / total
             for name in ("lag", "utilisation", "effective_sample_share", "abs_log_ratio_p95")}
    return {**means, "buckets": {bucket: {"tokens": weight[bucket], **{
        name: value / weight[bucket] for name, value in sums[bucket].items()}} for bucket in BUCKETS if weight[bucket]}}
