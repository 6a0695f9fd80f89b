"""The contract that every ``Env`` keeps, as a check; ``tests/sim/test_env_contract.py`` runs all of ours through it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.types import Env, Source

SEEDS = (11, 12, 13, 14, 15, 16, 17, 18)


def check_env(make_env: Callable[[], Env], *, atol: float = 0.0) -> None:
    """Raise AssertionError where the environment breaks ``data.types.Env``'s contract.

    ``make_env`` returns a fresh environment of 2 to 8 rows, all of the same task (seeds are compared across rows).
    ``atol`` is the difference in frames (0..255) and proprio that a batched network's rounding may cause; reward and
    flags are then compared within it too.
    """
    env, again = make_env(), make_env()
    try:
        n = env.num_envs
        assert 2 <= n <= len(SEEDS)
        _check_description(env)
        first = play(env, SEEDS[:n])
        _check_episode(env, first)
        reverse = play(again, SEEDS[:n][::-1])
        for row in range(n):
            _same(first, row, reverse, n - 1 - row, atol)  # same seed, other row, other process
        repeat = play(env, SEEDS[:n])
        for row in range(n):
            _same(first, row, repeat, row, atol)  # same seed after other episodes
        _check_masks(env, first, atol)
        _check_not_aliased(env)
    finally:
        for each in (env, again):
            each.close()
            each.close()


def play(env: Env, seeds: tuple[int, ...] | list[int]) -> list[tuple]:
    """Reset all rows and step with fixed actions per seed until every row is parked, and twice more."""
    n = env.num_envs
    observation, info = env.reset(seed=list(seeds), options={"reset_mask": np.ones(n, bool)})
    zeros = np.zeros(n, bool)
    history = [(observation, np.zeros(n, np.float32), zeros, zeros, info)]
    streams = [np.random.default_rng(seed) for seed in seeds]
    parked = 0
    for _ in range(env.max_episode_steps + 2):
        actions = np.stack([stream.uniform(-1, 1, env.spec.action_dim) for stream in streams]).astype(np.float32)
        history.append(env.step(actions))
        parked += bool((history[-1][2] | history[-1][3]).all())
        if parked > 2:
            break
    return history


def _check_description(env: Env) -> None:
    assert isinstance(env, Env)
    assert env.metadata["autoreset_mode"] == "disabled"
    assert isinstance(env.source, Source)
    assert (env.source is Source.IMAGINED) == (env.world_model_version >= 0)
    assert len(env.statistics.action_low) == len(env.statistics.action_high) == env.spec.action_dim
    assert len(env.statistics.proprio_mean) == len(env.statistics.proprio_std) == env.spec.proprio_dim
    assert (env.statistics.proprio_std > 0).all()
    assert env.spec.control_hz > 0
    assert env.embodiment
    assert dict(env.provenance)


def _check_episode(env: Env, history: list[tuple]) -> None:
    n, spec = env.num_envs, env.spec
    size = spec.image_size
    over = np.zeros(n, bool)
    before = None
    for step, (observation, reward, terminated, truncated, info) in enumerate(history):
        assert set(observation) == {"frames", "proprio"}
        assert tuple(observation["frames"]) == spec.cameras
        for frames in observation["frames"].values():
            assert frames.shape == (n, size, size, 3)
            assert frames.dtype == np.uint8
            assert (frames.reshape(n, -1).max(axis=1) > 30).all(), "a frame is black"
            assert (frames.reshape(n, -1).std(axis=1) > 3).all(), "a frame is a flat colour"
        assert observation["proprio"].shape == (n, spec.proprio_dim)
        assert observation["proprio"].dtype == np.float32
        assert np.isfinite(observation["proprio"]).all()
        for values, dtype in ((reward, np.float32), (terminated, bool), (truncated, bool),
                              (info["success"], bool), (info["uncertainty"], np.float32), (info["time"], np.float64)):
            assert values.shape == (n,)
            assert values.dtype == dtype
            assert np.isfinite(values).all()
        for name in ("instruction", "task"):
            assert len(info[name]) == n
            assert all(isinstance(text, str) and text for text in info[name])
        assert not (terminated & truncated).any(), "an episode ends in one way"
        assert not (info["success"] & ~terminated).any(), "success implies terminated"
        assert (info["uncertainty"] >= 0).all()
        if before is not None:
            _check_parked(over, before, history[step])
            assert (info["time"][~over] > before[4]["time"][~over]).all(), "time stands still"
        over = over | terminated | truncated
        before = history[step]
    assert over.all(), "an episode is longer than max_episode_steps"
    for camera in spec.cameras:
        for row in range(n):
            moved = history[0][0]["frames"][camera][row] != before[0]["frames"][camera][row]
            assert moved.any(), "frames stand still"


def _check_parked(over: np.ndarray, before: tuple, after: tuple) -> None:
    """Rows that are over repeat their last observation and flags with reward 0."""
    assert (after[1][over] == 0).all(), "a parked row was rewarded"
    for index in (2, 3):
        assert (after[index][over] == before[index][over]).all(), "a parked row changed its flags"
    for camera, frames in after[0]["frames"].items():
        assert (frames[over] == before[0]["frames"][camera][over]).all(), "a parked row moved"
    assert (after[0]["proprio"][over] == before[0]["proprio"][over]).all()
    assert (after[4]["success"][over] == before[4]["success"][over]).all()
    assert (after[4]["time"][over] == before[4]["time"][over]).all()


def _same(one: list[tuple], row: int, two: list[tuple], other: int, atol: float) -> None:
    """Both rows played the same episode."""
    for step, (a, b) in enumerate(zip(one, two, strict=False)):
        for camera in a[0]["frames"]:
            difference = a[0]["frames"][camera][row].astype(int) - b[0]["frames"][camera][other].astype(int)
            assert np.abs(difference).max() <= atol, f"step {step}: the seed does not decide the frames"
        assert np.allclose(a[0]["proprio"][row], b[0]["proprio"][other], rtol=0, atol=atol), f"step {step}: proprio"
        for index in (1, 2, 3):
            assert np.isclose(float(a[index][row]), float(b[index][other]), rtol=0, atol=atol), f"step {step}: {index}"
        for name in ("instruction", "task"):
            assert a[4][name][row] == b[4][name][other], f"step {step}: the seed does not decide the {name}"


def _check_masks(env: Env, first: list[tuple], atol: float) -> None:
    """A masked reset restarts those rows and leaves the others where they are."""
    n = env.num_envs
    start, _ = env.reset(seed=list(SEEDS[:n]), options={"reset_mask": np.ones(n, bool)})
    moved = env.step(np.full((n, env.spec.action_dim), 0.7, np.float32))
    mask = np.zeros(n, bool)
    mask[0] = True
    seeds = [SEEDS[0], *[None] * (n - 1)]
    observation, info = env.reset(seed=seeds, options={"reset_mask": mask})
    for camera, frames in observation["frames"].items():
        assert np.abs(frames[0].astype(int) - start["frames"][camera][0].astype(int)).max() <= atol
        assert (frames[1:] == moved[0]["frames"][camera][1:]).all(), "a row outside the mask was touched"
    assert (info["time"][1:] == moved[4]["time"][1:]).all()
    assert info["time"][0] == first[0][4]["time"][0]


def _check_not_aliased(env: Env) -> None:
    """What was returned does not change under the caller, and the caller's writes do not reach the env."""
    n = env.num_envs
    observation, _ = env.reset(seed=list(SEEDS[:n]), options={"reset_mask": np.ones(n, bool)})
    kept = {camera: frames.copy() for camera, frames in observation["frames"].items()}
    action = np.full((n, env.spec.action_dim), -0.7, np.float32)
    after = env.step(action)
    for camera, frames in observation["frames"].items():
        assert (frames == kept[camera]).all(), "a returned array changed later"
        frames[:] = 0
    for array in (after[1], after[2], after[3], after[4]["success"], after[0]["proprio"]):
        array[:] = 0
    mask = np.zeros(n, bool)
    fresh, _ = env.reset(seed=[None] * n, options={"reset_mask": mask})
    for camera, frames in fresh["frames"].items():
        assert (frames == after[0]["frames"][camera]).all(), "writing into a returned array changed the env"
    assert fresh["proprio"].any()
