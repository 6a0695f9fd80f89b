"""How many simulator steps a policy needs to get good, with and without imagination: one arm on one task and seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from data.batches import to_torch
from data.rollout import rollout
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from data.types import Env, Policy, Trajectory, UserError
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


def learn(
    experiment: Experiment, arm: Arm, *, make_env: Callable[..., VectorEnv], task: str, seed: int, warm_start: Path,
    world_model: Path, recorded: Path, scratch: Path,
) -> dict[str, Any]:
    """Train from ``warm_start`` until the level is reached; success over simulator steps, and what it took.

    ``recorded`` is what the world model was fitted on, and where imagination branches from.
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
    dream: Env | None = None
    if arm.branches:
        dream = WorldModelLearner.from_pretrained(world_model).imagination(
            ReplayStore.open(recorded), replace(experiment.imagination, tasks=(env.tasks[0],)), num_envs=arm.branches)
    steps = {"simulated": 0, "imagined": 0}
    curve: list[dict[str, float]] = []
    measuring, begun = 0.0, time.process_time()

    def evaluate() -> None:
        nonlocal measuring
        since = time.process_time()
        played = evaluate_policy(env, policy, trials_per_task=experiment.trials, first_seed=experiment.first_seed,
                                 sample=True)
        measuring += time.process_time() - since
        curve.append({**steps, "success": played.success().estimate,
                      "cpu_seconds": time.process_time() - begun - measuring})

    evaluate()
    for iteration in range(arm.iterations):
        if iteration % arm.simulate_every == 0:
            played = play(env, policy, arm.episodes, seed, "collect", iteration)
            store.append(played)
            steps["simulated"] += sum(map(len, played))
        if dream is not None:
            imagined = play(dream, policy, arm.branches, seed, "imagine", iteration)
            store.append(imagined)
            steps["imagined"] += sum(map(len, imagined))
        first = iteration * experiment.updates_per_iteration
        for step in range(first, first + experiment.updates_per_iteration):
            learner.update(to_torch(sampler.sample(step, version=policy.version), torch.device("cpu")))
        if (iteration + 1) % experiment.evaluate_every == 0:
            evaluate()
            if steps_to(experiment.level, curve) is not None:
                break
    store.close()
    return {"curve": curve}


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
