"""Small made-up data that several test modules share."""

from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric

from data.sampler import ReplayConfig
from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Statistics, Success, Trajectory
from wm_rl.learner import Learner, LearnerConfig
from wm_rl.objectives import Gipo
from wm_rl.policy import TinyVLA, TinyVLAConfig
from wm_rl.trust import Trust

SPEC = Spec(cameras=("front",), image_size=16, proprio_names=("x", "y"), action_names=("dx", "dy", "grip"),
            control_hz=10.0)
STATISTICS = Statistics(action_low=-np.ones(3, np.float32), action_high=np.ones(3, np.float32),
                        proprio_mean=np.zeros(2, np.float32), proprio_std=np.ones(2, np.float32))
POLICY = TinyVLAConfig(chunk=2, bins=5, width=16, layers=1, channels=(8, 8), vocabulary=64, words=8)
LEARNER = LearnerConfig(
    learning_rate=1e-3, encoder_learning_rate=1e-3, value_learning_rate=1e-3, trace=0.95, entropy_coefficient=0.01,
    kl_coefficient=0.01, centre_advantages=False, value_warmup=0, max_gradient_norm=1.0)
TRUST = Trust(imagined_temperature=1.0)
REPLAY = ReplayConfig(windows=8, decisions=4, discount=0.9, mix={"sim": 0.5, "real": 0.25, "imagined": 0.25},
                      capacity={"sim": None, "real": None, "imagined": None})


def trajectory(seed: int, steps: int, source: Source, *, behaviour: Behaviour = Behaviour.LOGGED) -> Trajectory:
    """Random, but of the right shape everywhere; a decision every second step; ends in success when seed is even."""
    draw = np.random.default_rng(seed)
    solved = seed % 2 == 0
    known = behaviour is Behaviour.LOGGED
    last = np.arange(steps) == steps - 1
    return Trajectory(
        frames={"front": draw.integers(0, 255, (steps + 1, 16, 16, 3), dtype=np.uint8)},
        proprio=draw.normal(size=(steps + 1, 2)).astype(np.float32),
        action=draw.uniform(-1, 1, (steps, 3)).astype(np.float32),
        action_token=draw.integers(0, 5, (steps, 3)).astype(np.int16) if known else np.full((steps, 3), -1, np.int16),
        log_prob=(draw.normal(-1.6, 0.2, (steps, 3)) if known else np.full((steps, 3), np.nan)).astype(np.float32),
        decision=(np.arange(steps) % 2 == 0) & known, reward=(last & solved).astype(np.float32),
        terminated=last & solved, truncated=last & (not solved), policy_version=np.full(steps, seed % 7, np.int64),
        uncertainty=np.full(steps, 0.3 if source is Source.IMAGINED else 0.0, np.float32),
        timestamp=np.arange(steps + 1) / 10, source=source, task="reach", instruction="reach the goal",
        success=Success.YES if solved else Success.NO, behaviour=behaviour, embodiment="toy",
        world_model_version=0 if source is Source.IMAGINED else -1, provenance={"seed": seed})


def store(folder: Path) -> ReplayStore:
    """Four episodes of each source."""
    replay = ReplayStore.create(folder, spec=SPEC, statistics=STATISTICS, embodiment="toy")
    for i, source in enumerate(Source):
        replay.append([trajectory(10 * i + j, 5 + j, source) for j in range(4)])
    return replay


def policy(seed: int = 0) -> TinyVLA:
    return TinyVLA(POLICY, spec=SPEC, statistics=STATISTICS, seed=seed)


def learner(fabric: Fabric, config: LearnerConfig = LEARNER, trust: Trust = TRUST) -> Learner:
    torch.use_deterministic_algorithms(True)
    return Learner(config, fabric=fabric, policy=policy(0), reference=policy(1), objective=Gipo(beta=0.5), trust=trust)
