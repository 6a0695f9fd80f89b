"""Does what imagination says come true? The same actions from the same states, in the simulator.

An imagined episode leaves a recorded one at some step. The simulator plays the recorded one once, keeps a snapshot at
each of these steps, and plays every imagined episode's actions from its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.rollout import rollout
from data.store import ReplayStore
from data.types import Policy, Success, Trajectory
from sim.vector import VectorEnv
from world_model.config import ImaginationConfig
from world_model.imagination import Branch
from world_model.learner import WorldModelLearner

BRANCHES = 96
"""Imagined episodes that are checked."""


def check_claims(
    env: VectorEnv, learner: WorldModelLearner, starts: ReplayStore, policy: Policy, imagination: ImaginationConfig
) -> dict[str, float]:
    """Let ``policy`` imagine ``BRANCHES`` episodes that leave those of ``starts``, and hold them against ``env``.

    ``starts`` was recorded in ``env``. Returns the shares ``claims_imagined`` and ``claims_simulated`` that succeed,
    and ``claims_agree``, in which both say the same; ``claims_true``, the share of the claimed successes that come
    true, is left out where nothing is claimed.
    """
    config = replace(imagination, sources=("sim",), newest=None, inference_steps=learner.config.inference_steps)
    dream = learner.imagination(starts, config, num_envs=imagination.micro_batch)
    seeds = [range(row, BRANCHES, dream.num_envs) for row in range(dream.num_envs)]
    imagined = sorted(rollout(dream, policy, seeds, sample=True), key=lambda episode: episode.provenance["seed"])
    branches = [dream.branch(episode.provenance["seed"]) for episode in imagined]
    claimed = np.array([episode.success is Success.YES for episode in imagined])
    came = np.array(play_branches(env, starts, branches, imagined))
    found = {"claims_imagined": float(claimed.mean()), "claims_simulated": float(came.mean()),
             "claims_agree": float((claimed == came).mean())}
    return found | ({"claims_true": float(came[claimed].mean())} if claimed.any() else {})


def play_branches(
    env: VectorEnv, starts: ReplayStore, branches: Sequence[Branch], imagined: Sequence[Trajectory]
) -> list[bool]:
    """Whether each of ``imagined`` succeeds in ``env``, played from where it left an episode of ``starts``."""
    of: dict[int, list[int]] = defaultdict(list)
    for index, branch in enumerate(branches):
        of[branch.episode].append(index)
    came = [False] * len(branches)
    for episode, indices in of.items():
        recorded = starts.trajectory(episode)
        row = list(env.row_tasks).index(recorded.task)
        alone = np.arange(env.num_envs) == row
        seed = recorded.provenance["seed"]
        observation, _ = env.reset(seed=[seed] * env.num_envs, options={"reset_mask": alone})
        snapshots = {}
        for step in range(1 + max(branches[index].step for index in indices)):
            assert np.array_equal(observation["proprio"][row], recorded.proprio[step]), "it was recorded elsewhere"
            snapshots[step] = env.snapshot(row)
            if step < len(recorded):
                observation, *_ = env.step(np.tile(recorded.action[step], (env.num_envs, 1)))
        for index in indices:
            env.restore(row, snapshots[branches[index].step])
            came[index] = any(env.step(np.tile(action, (env.num_envs, 1)))[4]["success"][row]
                              for action in imagined[index].action)
    return came
