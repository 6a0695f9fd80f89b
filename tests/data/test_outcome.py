"""What follows an episode's end: seen by world models, by nobody who learns to act."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.lerobot import VERSIONS
from data.lerobot_writer import write_lerobot
from data.logs.ingest import IngestConfig, ingest
from data.outcome import steps_until_decided, success_frames, undecided_frames
from data.sampler import DecisionSampler, ReplayConfig, StepSampler
from data.store import ReplayStore
from data.types import Behaviour, Source, Success


@pytest.fixture(scope="module")
def with_aftermath(make_trajectory):
    """A successful episode of ``steps`` steps and the same going on for some; in some of these it is still done."""

    def make(seed, steps, still_done, **other):
        rows = steps + len(still_done)
        whole = make_trajectory(seed, rows, **other)
        terminated = np.arange(rows) == steps - 1
        reward = np.concatenate([terminated[:steps], still_done]).astype("f4")
        whole = dataclasses.replace(
            whole, terminated=terminated, reward=reward, decision=whole.decision & (np.arange(rows) < steps))
        per_step = {name: getattr(whole, name)[:steps] for name in (
            "action", "action_token", "log_prob", "decision", "reward", "terminated", "truncated", "policy_version",
            "uncertainty")}
        observed = {name: getattr(whole, name)[: steps + 1] for name in ("proprio", "timestamp")}
        frames = {camera: each[: steps + 1] for camera, each in whole.frames.items()}
        return dataclasses.replace(whole, frames=frames, **per_step, **observed), whole

    return make


def test_by_hand():
    over, paid = np.array([False, True, False, False]), np.array([0, 1, 1, 0], "f4")
    assert steps_until_decided(over) == 2
    assert steps_until_decided(np.zeros(3, bool)) == 3
    assert success_frames(over, paid, succeeded=True).tolist() == [False, False, True, True, False]
    assert success_frames(over, np.zeros(4, "f4"), succeeded=True).tolist() == [False, False, True, False, False]
    assert not success_frames(over, paid, succeeded=False).any()
    assert undecided_frames(over).tolist() == [True, True, False, False, False]
    assert undecided_frames(np.zeros(3, bool)).all()
    assert not success_frames(np.zeros(4, bool), paid, succeeded=True).any()


@settings(max_examples=30, deadline=None)
@given(episodes=st.lists(st.tuples(st.integers(1, 7), st.lists(st.booleans(), max_size=4)), min_size=1, max_size=4),
       d=st.integers(1, 5), k=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_policy_learning_reads_the_same_with_and_without(
    tmp_path_factory, with_aftermath, make_store, episodes, d, k, seed
):
    pairs = [with_aftermath(i, steps, done) for i, (steps, done) in enumerate(episodes)]
    config = ReplayConfig(windows=6, decisions=d, discount=0.9, mix={"sim": 1, "real": 0, "imagined": 0},
                          capacity={"sim": None, "real": None, "imagined": None})
    folder = tmp_path_factory.mktemp("s")
    short, long = (DecisionSampler(make_store(folder / str(i), [pair[i] for pair in pairs]), config, chunk=k, seed=seed)
                   .sample(3) for i in (0, 1))
    for name, value in vars(short).items():
        other = getattr(long, name)
        if isinstance(value, dict):
            assert all(torch.equal(value[camera], other[camera]) for camera in value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def test_world_models_see_it_and_are_told(tmp_path, with_aftermath, make_store):
    _, whole = with_aftermath(0, 3, [True, True, False])
    store = make_store(tmp_path / "s", [whole])
    batch = StepSampler(store, sources={"sim": 1.0}, context=2, horizon=1, seed=0).sample(0, 200)
    place = batch.proprio[:, :, 0].int()  # the row
    assert torch.equal(batch.aftermath, (place[:, :-1] >= 3) & batch.mask)
    assert place.max() == 6


@pytest.mark.parametrize("version", VERSIONS)
def test_it_survives_a_log(tmp_path, spec, statistics, with_aftermath, version):
    small = dataclasses.replace(spec, image_size=16)
    pairs = [with_aftermath(i, 4, done, size=16, source=Source.REAL, behaviour=Behaviour.UNKNOWN)
             for i, done in enumerate(([], [True, True], [True, False]))]
    write_lerobot(tmp_path / "log", [whole for _, whole in pairs], spec=small, statistics=statistics, fps=10,
                  version=version)
    ingest(tmp_path / "log", tmp_path / "store",
           IngestConfig(cameras=None, image_size=16, embodiment="arm", action_range="quantile", clip=False))
    store = ReplayStore.open(tmp_path / "store")
    for index, (_, whole) in enumerate(pairs):
        read = store.trajectory(index)
        assert read.terminated.tolist() == whole.terminated.tolist()
        assert read.reward.tolist() == whole.reward.tolist()
        assert not read.truncated.any()
        assert read.success is Success.YES
