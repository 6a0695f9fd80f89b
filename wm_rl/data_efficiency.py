"""How many simulator steps a policy needs to get good, with and without imagination: one arm on one task and seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from data.batches import to_torch
from data.rollout import rollout
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from data.types import Env, Policy, Success, Trajectory, UserError
from sim.evaluation import evaluate_policy
from sim.vector import VectorEnv
from wm_rl.learner import Learner, LearnerConfig
from wm_rl.objectives import Objective
from wm_rl.policy import TinyVLA
from wm_rl.seeding import training_episode
from wm_rl.trust import Trust
from world_model.config import ImaginationConfig
from world_model.learner import WorldModelLearner


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a policy learns from."""

    iterations: int
    simulate_every: int
    """Iterations from one round of simulated episodes to the next."""
    episodes: int
    """Simulated episodes of a round."""
    branches: int
    """Imagined episodes per iteration."""
    refit_steps: int
    """Gradient steps of the success model after every round of simulated episodes; 0: it stays as it was fitted."""
    recordings: int
    """Recorded episodes of the task that the arm begins with. Imagination branches from them, refits see them, and the
    policy learns from those that a policy acted."""
    replay: ReplayConfig

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        for name in ("iterations", "simulate_every", "episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"an arm's {name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What both arms share."""

    updates_per_iteration: int
    evaluate_every: int
    trials: int
    first_seed: int
    level: float
    """Success at which an arm stops."""
    learner: LearnerConfig
    objective: Objective
    trust: Trust
    imagination: ImaginationConfig
    refit: Mapping[str, Any]
    """What refits change in the world model's configuration."""


def learn(
    experiment: Experiment, arm: Arm, *, make_env: Callable[..., VectorEnv], task: str, seed: int, warm_start: Path,
    world_model: Path, recorded: Path, scratch: Path,
) -> dict[str, Any]:
    """Train from ``warm_start`` until the level is reached; success over simulator steps, and what it took.

    ``recorded`` is what the world model was fitted on. In the curve ``claimed`` counts the successes that imagination
    saw in the newly simulated episodes' actions (``audit``) before any refit on them, ``true`` those that were
    recorded, ``dreamt`` the share of imagined episodes since the last point that ended in success.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        env = make_env(tasks=[task], workers=0)
        try:
            return _learn(experiment, arm, env, seed, warm_start, world_model, recorded, Path(folder))
        finally:
            env.close()


def _learn(
    experiment: Experiment, arm: Arm, env: VectorEnv, seed: int, warm_start: Path, world_model: Path, recorded: Path,
    folder: Path,
) -> dict[str, Any]:
    store = ReplayStore.create(folder / "replay.zarr", spec=env.spec, statistics=env.statistics,
                               embodiment=env.embodiment)
    torch.manual_seed(seed)
    policy, reference = TinyVLA.load(warm_start), TinyVLA.load(warm_start)
    policy.version = 0
    learner = Learner(experiment.learner, fabric=Fabric(accelerator="cpu", devices=1), policy=policy,
                      reference=reference, objective=experiment.objective, trust=experiment.trust)
    sampler = DecisionSampler(store, arm.replay, chunk=policy.chunk, seed=seed)
    model: WorldModelLearner | None = None
    imagination = replace(experiment.imagination, tasks=(env.tasks[0],))
    if arm.branches:
        model = WorldModelLearner.from_pretrained(world_model, changes=experiment.refit)
    if arm.recordings:
        store.append(_spread(ReplayStore.open(recorded), env.tasks[0], arm.recordings))
    counts = {"simulated": 0, "imagined": 0, "claimed": 0, "true": 0}
    dreamt: list[bool] = []
    curve: list[dict[str, float]] = []
    measuring, begun = 0.0, time.process_time()

    def evaluate() -> None:
        nonlocal measuring
        since = time.process_time()
        played = evaluate_policy(env, policy, trials_per_task=experiment.trials, first_seed=experiment.first_seed,
                                 sample=True)
        measuring += time.process_time() - since
        curve.append({**counts, "dreamt": float(np.mean(dreamt)) if dreamt else 0.0,
                      "success": played.success().estimate, "cpu_seconds": time.process_time() - begun - measuring})
        dreamt.clear()

    evaluate()
    for iteration in range(arm.iterations):
        if iteration % arm.simulate_every == 0:
            played = play(env, policy, arm.episodes, seed, "collect", iteration)
            store.append(played)
            counts["simulated"] += sum(map(len, played))
            if model is not None:
                audited = model.audit(store, imagination, episodes=range(len(store) - len(played), len(store)))
                counts["claimed"] += int(audited["audit/imagined_successes"])
                counts["true"] += int(audited["audit/recorded_successes"])
                model.fit_success(store, arm.refit_steps)
        if model is not None:
            dream = model.imagination(store, imagination, num_envs=arm.branches)
            imagined = play(dream, policy, arm.branches, seed, "imagine", iteration)
            store.append(imagined)
            counts["imagined"] += sum(map(len, imagined))
            dreamt += [trajectory.success is Success.YES for trajectory in imagined]
        first = iteration * experiment.updates_per_iteration
        for step in range(first, first + experiment.updates_per_iteration):
            learner.update(to_torch(sampler.sample(step, version=policy.version), torch.device("cpu")))
        if (iteration + 1) % experiment.evaluate_every == 0:
            evaluate()
            if steps_to(experiment.level, curve) is not None:
                break
    store.close()
    return {"curve": curve}


def _spread(recorded: ReplayStore, task: str, most: int) -> list[Trajectory]:
    """Up to ``most`` recorded episodes of a task, evenly from the first to the last."""
    own = np.flatnonzero(np.asarray(recorded.episodes.task).astype(str) == task)
    chosen = own[np.linspace(0, len(own) - 1, min(most, len(own))).round().astype(int)]
    return [recorded.trajectory(int(index)) for index in chosen]


def play(env: Env, policy: Policy, episodes: int, seed: int, purpose: str, iteration: int) -> list[Trajectory]:
    """Sample training episodes, dealt over the rows of ``env``; ``purpose`` and ``iteration`` seed them."""
    seeds: list[list[int]] = [[] for _ in range(env.num_envs)]
    for i in range(episodes):
        seeds[i % env.num_envs].append(training_episode(seed, purpose, iteration, i))
    return list(rollout(env, policy, seeds, sample=True))


def steps_to(level: float, curve: list[dict[str, float]], window: int = 2) -> dict[str, float] | None:
    """The first point at which the mean success of ``window`` evaluations reached ``level``; None: never (censored)."""
    for i in range(window - 1, len(curve)):
        if sum(point["success"] for point in curve[i - window + 1 : i + 1]) / window >= level - 1e-9:
            return curve[i]
    return None
