"""Does imagination rank policies as simulation does? The same policies from the same initial frames, in both."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from data.rollout import rollout
from data.store import ReplayStore
from data.types import Policy, Success
from sim.evaluation import evaluate_policy
from sim.vector import VectorEnv
from world_model.config import ImaginationConfig
from world_model.learner import WorldModelLearner

IMAGINED_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What the policies achieved in the simulator, and where they began."""

    success: Mapping[str, float]
    starts: ReplayStore
    """Episodes whose first frames are the initial states; the same for every policy."""


def simulate(
    env: VectorEnv, policies: Mapping[str, Policy], *, trials_per_task: int, first_seed: int, folder: Path
) -> Simulated:
    """Play ``trials_per_task`` episodes per task with each policy, sampled, from the same seeds."""
    success, starts = {}, None
    for name, policy in policies.items():
        played = evaluate_policy(
            env, policy, trials_per_task=trials_per_task, first_seed=first_seed, sample=True, keep=trials_per_task)
        success[name] = played.success().estimate
        if starts is None:
            starts = ReplayStore.create(Path(tempfile.mkdtemp(dir=folder)) / "starts.zarr", spec=env.spec,
                                        statistics=env.statistics, embodiment=env.embodiment)
            starts.append(list(played.episodes))
    assert starts is not None, "there is at least one policy"
    return Simulated(success=success, starts=starts)


def imagine(
    learner: WorldModelLearner, simulated: Simulated, policies: Mapping[str, Policy], *, horizon: int,
    imagination: ImaginationConfig,
) -> dict[str, float]:
    """Success of each policy when whole episodes of ``horizon`` steps are imagined from the same first frames."""
    store, config = simulated.starts, replace(
        imagination, horizon=horizon, sources=("sim",), starts={"beginning": 1.0}, newest=None,
        inference_steps=learner.config.inference_steps)
    episodes = len(store)
    rows = min(IMAGINED_ROWS, episodes)
    env = learner.imagination(store, config, num_envs=rows)
    seeds = [list(range(row, episodes, rows)) for row in range(rows)]
    return {name: float(np.mean([each.success is Success.YES for each in rollout(env, policy, seeds, sample=True)]))
            for name, policy in policies.items()}


def rank_correlation(simulated: Mapping[str, float], imagined: Mapping[str, float]) -> float:
    """Spearman's; 0 where one of them does not vary."""
    one, other = list(simulated.values()), [imagined[name] for name in simulated]
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    return float(spearmanr(one, other).statistic)
