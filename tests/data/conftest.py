"""Small specs and random trajectories for the tests of ``data``. Session-scoped, so hypothesis may use them."""

import numpy as np
import pytest

from data.store import ReplayStore
from data.types import Behaviour, Source, Spec, Statistics, Success, Trajectory

SIZE = 8


@pytest.fixture(scope="session")
def spec():
    return Spec(cameras=("front", "wrist"), image_size=SIZE, proprio_names=("row", "y"), action_names=("u", "v", "w"),
                control_hz=10.0)


@pytest.fixture(scope="session")
def statistics():
    return Statistics(action_low=np.array([-1, -2, 0.5], "f4"), action_high=np.array([1, 3, 0.7], "f4"),
                      proprio_mean=np.zeros(2, "f4"), proprio_std=np.ones(2, "f4"))


@pytest.fixture(scope="session")
def make_trajectory():
    """A random trajectory; ``proprio[:, 0]`` counts its rows, so that a test can tell where a window began."""

    def make(seed=0, steps=6, *, decision=None, source=Source.SIM, behaviour=Behaviour.LOGGED, success=Success.YES,
             terminated=True, size=SIZE, cameras=("front", "wrist"), **other):
        rng = np.random.default_rng(seed)
        last = np.arange(steps) == steps - 1
        known = behaviour is not Behaviour.UNKNOWN
        if decision is None:
            decision = np.arange(steps) % 2 == 0
        return Trajectory(**({
            "frames": {c: rng.integers(0, 256, (steps + 1, size, size, 3), np.uint8) for c in cameras},
            "proprio": np.stack([np.arange(steps + 1), rng.normal(size=steps + 1)], 1).astype("f4"),
            "action": rng.uniform(-1, 1, (steps, 3)).astype("f4"),
            "action_token": rng.integers(0, 11, (steps, 3)).astype("i2") if known else np.full((steps, 3), -1, "i2"),
            "log_prob": (-rng.random((steps, 3)) if known else np.full((steps, 3), np.nan)).astype("f4"),
            "decision": np.asarray(decision, bool) & known, "reward": rng.normal(size=steps).astype("f4"),
            "terminated": last & terminated, "truncated": last & (not terminated),
            "policy_version": rng.integers(0, 9, steps), "uncertainty": rng.random(steps).astype("f4"),
            "timestamp": np.arange(steps + 1) / 10, "source": source, "task": "push", "success": success,
            "instruction": f"push {seed}", "behaviour": behaviour, "embodiment": "arm", "world_model_version": -1,
            "provenance": {"seed": seed}} | other))

    return make


@pytest.fixture(scope="session")
def make_store(spec, statistics):
    def make(path, *groups):
        store = ReplayStore.create(path, spec=spec, statistics=statistics, embodiment="arm")
        for group in groups:
            store.append(group)
        return store

    return make


@pytest.fixture(scope="session")
def assert_same():
    """Fail unless two trajectories are equal bit for bit."""

    def check(actual, expected):
        for name, value in vars(expected).items():
            found = getattr(actual, name)
            if name == "frames":
                assert found.keys() == value.keys()
                assert all(np.array_equal(found[camera], value[camera]) for camera in value)
            elif isinstance(value, np.ndarray):
                assert found.dtype == value.dtype, name
                assert found.tobytes() == value.tobytes(), name
            else:
                assert found == value, name

    return check
