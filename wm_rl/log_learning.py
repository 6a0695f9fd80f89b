"""What robot logs are worth: one policy trained with them, or without, on one seed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from data.batches import to_torch
from data.sampler import DecisionSampler, ReplayConfig
from data.store import ReplayStore
from data.types import Policy, UserError
from sim.evaluation import evaluate_policy
from sim.vector import VectorEnv
from wm_rl.data_efficiency import play
from wm_rl.learner import Learner, LearnerConfig
from wm_rl.objectives import Objective
from wm_rl.policy import TinyVLA, TinyVLAConfig
from wm_rl.trust import Trust


@dataclass(frozen=True, kw_only=True)
class LogArm:
    """How logs are used."""

    warm_start: bool
    """Begin from the clone of the logs; else from random weights, and the clone's updates are added to GIPO's."""
    replay: ReplayConfig


@dataclass(frozen=True, kw_only=True)
class LogExperiment:
    """What all arms share."""

    iterations: int
    episodes: int
    """Simulated episodes per iteration."""
    updates: int
    """GIPO updates per iteration, of an arm with a warm start."""
    trials_per_task: int
    first_seed: int
    learner: LearnerConfig
    objective: Objective
    trust: Trust

    def __post_init__(self) -> None:
        """Refuse counts that make no run."""
        for name in ("iterations", "episodes", "updates", "trials_per_task"):
            if getattr(self, name) < 1:
                raise UserError(f"experiment.{name} must be at least 1, got {getattr(self, name)}")


def learn(
    experiment: LogExperiment, arm: LogArm, *, env: Callable[[], VectorEnv], stand_in: Callable[[], VectorEnv],
    logs: Path, warm_start: Path, policy: TinyVLAConfig, clone_updates: int, seed: int, scratch: Path,
) -> dict[str, Any]:
    """Train in the simulator, play the held-out trials on the stand-in.

    ``logs`` is a replay store with the logs, labelled; ``warm_start`` the policy cloned from them with
    ``clone_updates`` gradient steps. Every arm gets the same simulated episodes' seeds and as many gradient steps in
    all.
    """
    begun = time.process_time()
    with tempfile.TemporaryDirectory(dir=scratch) as folder, closing(env()) as world:
        path = Path(folder) / "replay.zarr"
        if arm.warm_start:
            shutil.copytree(logs, path)
            store = ReplayStore.open(path)
            learned, reference = TinyVLA.load(warm_start), TinyVLA.load(warm_start)
            learned.version = 0
        else:
            store = ReplayStore.create(path, spec=world.spec, statistics=world.statistics, embodiment=world.embodiment)
            learned, reference = (TinyVLA(policy, spec=world.spec, statistics=world.statistics, seed=seed)
                                  for _ in range(2))
        learner = Learner(experiment.learner, fabric=Fabric(accelerator="cpu", devices=1), policy=learned,
                          reference=reference, objective=experiment.objective, trust=experiment.trust)
        sampler = DecisionSampler(store, arm.replay, chunk=learned.chunk, seed=seed)
        updates = experiment.iterations * experiment.updates + (0 if arm.warm_start else clone_updates)
        curve, done = [], 0
        with closing(store):
            for iteration in range(experiment.iterations):
                played = play(world, learned, experiment.episodes, seed, "collect", iteration)
                store.append(played)
                due = updates * (iteration + 1) // experiment.iterations
                rows = [learner.update(to_torch(sampler.sample(step, version=learned.version), torch.device("cpu")))
                        for step in range(done, due)]
                done = due
                curve.append({"collected_success": sum(t.success == "yes" for t in played) / len(played),
                              "control_steps": sum(map(len, played)),
                              "gradient_share_real": sum(row.get("gradient_share/real", 0.0) for row in rows)
                              / len(rows)})
    trials = judge_on_stand_in(learned, stand_in, experiment)
    return {"curve": curve, "trials": trials, "updates": updates + (clone_updates if arm.warm_start else 0),
            "cpu_seconds": time.process_time() - begun}


def judge_on_stand_in(
    policy: Policy, stand_in: Callable[[], VectorEnv], experiment: LogExperiment
) -> list[dict[str, Any]]:
    """Held-out trials, sampled: the same for every policy."""
    with closing(stand_in()) as env:
        played = evaluate_policy(env, policy, trials_per_task=experiment.trials_per_task,
                                 first_seed=experiment.first_seed, sample=True)
    return [asdict(trial) for trial in played.trials]
