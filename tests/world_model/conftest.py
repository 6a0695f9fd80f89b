"""A toy world: a bright square on a dark field that moves by the action; it is done when it touches the right edge."""

import numpy as np
import pytest

from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Statistics, Success, Trajectory

SIZE, STEPS, STRIDE = 32, 12, 5
SPEC = Spec(cameras=("front",), image_size=SIZE, proprio_names=("x", "y"), action_names=("dx", "dy"), control_hz=10.0)
STATISTICS = Statistics(
    action_low=np.full(2, -1, np.float32),
    action_high=np.full(2, 1, np.float32),
    proprio_mean=np.full(2, 0.5, np.float32),
    proprio_std=np.full(2, 0.3, np.float32),
)


def draw(place: np.ndarray) -> np.ndarray:
    """The square at ``place`` (pixels of its corner), ``uint8 [h, w, 3]``."""
    frame = np.full((SIZE, SIZE, 3), 40, np.uint8)
    x, y = np.round(place).astype(int)
    frame[y : y + 6, x : x + 6] = (230, 200, 60)
    return frame


def episode(seed: int, source: Source = Source.SIM) -> Trajectory:
    rng = np.random.default_rng(seed)
    place = rng.uniform(0, SIZE - 12, 2)
    frames, proprio, actions = [draw(place)], [place / SIZE], []
    goal = seed % 2 == 0
    for _ in range(STEPS):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        action[0] = abs(action[0]) if goal else action[0] * 0.5
        place = np.clip(place + STRIDE * action, 0, SIZE - 6)
        actions.append(action)
        frames.append(draw(place))
        proprio.append(place / SIZE)
        if place[0] >= SIZE - 6:
            break
    steps = len(actions)
    done, last = place[0] >= SIZE - 6, np.arange(steps) == steps - 1
    return Trajectory(
        frames={"front": np.stack(frames)},
        proprio=np.stack(proprio).astype(np.float32),
        action=np.stack(actions),
        action_token=np.full((steps, 2), -1, np.int16),
        log_prob=np.full((steps, 2), np.nan, np.float32),
        decision=np.zeros(steps, bool),
        reward=(last & done).astype(np.float32),
        terminated=last & done,
        truncated=last & ~done,
        policy_version=np.full(steps, -1),
        uncertainty=np.zeros(steps, np.float32),
        timestamp=np.arange(steps + 1) / 10,
        source=source,
        task="slide-right",
        instruction="slide the square to the right",
        success=Success.YES if done else Success.NO,
        behaviour=Behaviour.UNKNOWN,
        embodiment="square",
        world_model_version=-1,
        provenance={"seed": seed},
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """60 episodes: 40 sim, 20 real; treat as read-only."""
    path = tmp_path_factory.mktemp("toy") / "store"
    made = ReplayStore.create(path, spec=SPEC, statistics=STATISTICS, embodiment="square")
    made.append([episode(seed) for seed in range(40)])
    made.append([episode(seed, Source.REAL) for seed in range(40, 60)])
    return made
