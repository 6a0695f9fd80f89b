import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sampler import DecisionSampler, ReplayConfig, StepSampler, shares
from data.store import ReplayStore
from data.types import Behaviour, Source, Success, UserError

ALL = {"sim": None, "real": None, "imagined": None}


def config(**changes):
    return ReplayConfig(**({"windows": 5, "decisions": 3, "discount": 0.9, "capacity": ALL,
                            "mix": {"sim": 1, "real": 0, "imagined": 0}} | changes))


def assert_equal(first, second):
    for name, value in vars(first).items():
        other = getattr(second, name)
        if isinstance(value, dict):
            assert all(torch.equal(value[key], other[key]) for key in value)
        else:
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def check_row(batch, j, trajectory, d, k, gamma):
    """The slow, obvious reading of row ``j``: it must be a window of ``trajectory``."""
    steps = len(trajectory)
    decisions = [i for i in range(steps) if trajectory.decision[i]]
    first = decisions.index(int(batch.proprio[j, 0, 0]))
    assert 0 <= first <= max(0, len(decisions) - d)
    window = decisions[first : first + d]
    for column in range(d):
        real = column < len(window)
        assert bool(batch.mask[j, column]) == real
        if not real:
            for name in ("proprio", "token", "log_prob", "token_mask", "reward", "discount", "policy_version",
                         "uncertainty"):
                assert not getattr(batch, name)[j, column].any(), name
            assert not any(frames[j, column].any() for frames in batch.frames.values())
            continue
        row = window[column]
        later = [i for i in decisions if i > row]
        following = later[0] if later else steps
        for camera, frames in trajectory.frames.items():
            np.testing.assert_array_equal(batch.frames[camera][j, column], frames[row])
        np.testing.assert_array_equal(batch.proprio[j, column], trajectory.proprio[row])
        assert batch.policy_version[j, column] == trajectory.policy_version[row]
        reward = 0.0
        for i in range(following - row):
            reward += gamma**i * float(trajectory.reward[row + i])
        assert batch.reward[j, column] == pytest.approx(reward, abs=1e-5)
        assert batch.discount[j, column] == pytest.approx(gamma ** (following - row), abs=1e-6)
        mean = np.mean([trajectory.uncertainty[i] for i in range(row, following)])
        assert batch.uncertainty[j, column] == pytest.approx(mean, abs=1e-6)
        for i in range(k):
            inside = row + i < following
            assert bool(batch.token_mask[j, column, i]) == inside
            expected = trajectory.action_token[row + i] if inside else np.zeros(3)
            np.testing.assert_array_equal(batch.token[j, column, i], expected)
            expected = trajectory.log_prob[row + i] if inside else np.zeros(3)
            np.testing.assert_array_equal(batch.log_prob[j, column, i], expected)
    later = [i for i in decisions if i > window[-1]]
    following = later[0] if later else steps
    for camera, frames in trajectory.frames.items():
        np.testing.assert_array_equal(batch.final_frames[camera][j], frames[following])
    np.testing.assert_array_equal(batch.final_proprio[j], trajectory.proprio[following])
    assert bool(batch.terminated[j]) == (not later and bool(trajectory.terminated[-1]))
    assert batch.source[j] is trajectory.source
    assert bool(batch.cloned[j]) == (trajectory.behaviour is Behaviour.CLONED)


episode_strategy = st.tuples(
    st.lists(st.booleans(), min_size=1, max_size=12).filter(any), st.booleans(), st.sampled_from(Source),
    st.sampled_from([Behaviour.LOGGED, Behaviour.CLONED]))


@settings(max_examples=40, deadline=None)
@given(episodes=st.lists(episode_strategy, min_size=1, max_size=5), d=st.integers(1, 5), k=st.integers(1, 5),
       segment=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_every_window_is_what_the_obvious_reading_gives(make_trajectory, make_store, episodes, d, k, segment, seed):
    given = [make_trajectory(i, len(decision), decision=decision, terminated=terminated, source=source,
                             behaviour=behaviour)
             for i, (decision, terminated, source, behaviour) in enumerate(episodes)]
    present = {t.source for t in given}
    with tempfile.TemporaryDirectory() as folder:
        groups = [given[i : i + segment] for i in range(0, len(given), segment)]
        store = make_store(Path(folder) / "s", *groups)
        mix = {source.value: float(source in present) for source in Source}
        sampler = DecisionSampler(store, config(windows=6, decisions=d, mix=mix), chunk=k, seed=seed)
        batch = sampler.sample(seed % 7)
        assert len(batch.instruction) == 6
        for j, instruction in enumerate(batch.instruction):
            check_row(batch, j, given[int(instruction.split()[1])], d, k, 0.9)
        for name in ("log_prob", "reward", "uncertainty", "proprio", "final_proprio"):
            assert torch.isfinite(getattr(batch, name)).all()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, make_store, make_trajectory):
    """Six episodes of each source, in three segments."""
    groups = [[make_trajectory(10 * s + i, 7 + i, source=source) for s, source in enumerate(Source)]
              for i in range(6)]
    return make_store(tmp_path_factory.mktemp("mixed") / "s", *groups)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_shares_are_the_batch_of_one_process(mixed, world_size):
    sampler = DecisionSampler(mixed, config(windows=7, mix={"sim": 3, "real": 2, "imagined": 1}), chunk=2, seed=3)
    whole = sampler.sample(5)
    parts = [sampler.sample(5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for name, value in vars(whole).items():
        pieces = [getattr(part, name) for part in parts]
        if isinstance(value, dict):
            assert all(torch.equal(torch.cat([p[key] for p in pieces]), value[key]) for key in value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat(pieces), value)
        else:
            assert [item for piece in pieces for item in piece] == list(value)


def test_a_batch_depends_on_seed_step_and_content_only(mixed):
    mix = {"sim": 3, "real": 2, "imagined": 1}
    sampler = DecisionSampler(mixed, config(mix=mix), chunk=2, seed=3)
    batches = [sampler.sample(step) for step in (4, 0)]
    reopened = DecisionSampler(ReplayStore.open(mixed.path), config(mix=mix), chunk=2, seed=3)
    assert_equal(reopened.sample(0), batches[1])
    assert_equal(reopened.sample(4), batches[0])
    assert not torch.equal(batches[0].proprio, batches[1].proprio)
    other = DecisionSampler(mixed, config(mix=mix), chunk=2, seed=4)
    assert not torch.equal(other.sample(0).proprio, batches[1].proprio)
    steps = [StepSampler(store, sources=mix, context=2, horizon=3, seed=3).sample(4, 5)
             for store in (mixed, ReplayStore.open(mixed.path))]
    assert_equal(*steps)


def test_every_valid_start_is_drawn_about_equally_often(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0, 7, decision=[1] * 7), make_trajectory(1, 2)])
    sampler = DecisionSampler(store, config(windows=200, decisions=3), chunk=1, seed=0)
    counts = {}
    for step in range(10):
        batch = sampler.sample(step)
        for instruction, start in zip(batch.instruction, batch.proprio[:, 0, 0].tolist(), strict=True):
            counts[instruction, start] = counts.get((instruction, start), 0) + 1
    # Episodes equally likely; five starts leave room for three of seven decisions.
    assert counts.keys() == {("push 1", 0.0), *(("push 0", float(i)) for i in range(5))}
    assert counts["push 1", 0.0] == pytest.approx(1000, abs=100)
    assert all(counts["push 0", float(i)] == pytest.approx(200, abs=60) for i in range(5))


def test_sources_get_their_share_and_capacity_keeps_the_newest(mixed):
    capacity = {"sim": 2, "real": None, "imagined": 1}
    sampler = DecisionSampler(mixed, config(windows=10, mix={"sim": 5, "real": 3, "imagined": 2}, capacity=capacity),
                              chunk=2, seed=0)
    seen = {source: set() for source in Source}
    for step in range(30):
        batch = sampler.sample(step)
        assert [batch.source.count(source) for source in Source] == [5, 3, 2]
        for source, instruction in zip(batch.source, batch.instruction, strict=True):
            seen[source].add(int(instruction.split()[1]))
    assert seen == {Source.SIM: {4, 5}, Source.REAL: {10, 11, 12, 13, 14, 15}, Source.IMAGINED: {25}}


def test_largest_remainder():
    assert shares({"sim": 1, "real": 1, "imagined": 1}, 8) == {Source.SIM: 3, Source.REAL: 3, Source.IMAGINED: 2}
    assert shares({"sim": 0.5, "real": 0.3, "imagined": 0.2}, 4) == {Source.SIM: 2, Source.REAL: 1, Source.IMAGINED: 1}
    assert shares({"sim": 2.0, "real": 0.0}, 3) == {Source.SIM: 3}


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.floats(0, 100), min_size=3, max_size=3).filter(lambda w: sum(w) > 1e-3),
       total=st.integers(1, 200))
def test_shares_add_up_and_are_within_one_of_exact(weights, total):
    parts = shares(dict(zip(["sim", "real", "imagined"], weights, strict=True)), total)
    assert sum(parts.values()) == total
    for source, weight in zip(Source, weights, strict=True):
        assert abs(parts.get(source, 0) - total * weight / sum(weights)) < 1 + 1e-6


def test_a_source_with_weight_and_nothing_to_draw_is_an_error(tmp_path, make_store, make_trajectory):
    unknown = make_trajectory(1, source=Source.REAL, behaviour=Behaviour.UNKNOWN)
    store = make_store(tmp_path / "s", [make_trajectory(0), unknown])
    sampler = DecisionSampler(store, config(mix={"sim": 1, "real": 0.01, "imagined": 0}), chunk=2, seed=0)
    with pytest.raises(UserError, match=r"1 episodes, none with a known behaviour .* type replay.mix.real=0"):
        sampler.sample(0)
    with pytest.raises(UserError, match=r"has no episodes of source imagined; .*replay.mix.imagined=0"):
        DecisionSampler(store, config(mix={"sim": 1, "real": 0, "imagined": 1}), chunk=2, seed=0).sample(0)
    with pytest.raises(UserError, match="no imagined episodes"):
        StepSampler(store, sources={"imagined": 1}, context=1, horizon=1, seed=0).sample(0, 1)
    # Once its behaviour is cloned it can be drawn, without a new sampler.
    store.seal()
    store.label_behaviour(store.episodes.segment[1], action_token=np.ones((7, 3), "i2"),
                          log_prob=np.full((7, 3), -1, "f4"), decision=np.ones(7, bool), model="clone")
    sampler.config.mix["real"] = 1.0
    batch = sampler.sample(0)
    assert batch.cloned.tolist() == [source is Source.REAL for source in batch.source]
    assert batch.cloned.any()


@pytest.mark.parametrize(("changes", "message"), [
    ({"mix": {"sim": 1, "reel": 1, "imagined": 0}}, "replay.mix: .*did you mean real"),
    ({"mix": {"sim": 1, "imagined": 0}}, "expected a value for real"),
    ({"mix": {"sim": -1, "real": 1, "imagined": 1}}, "weight of 0 or more, got -1"),
    ({"mix": {"sim": 0, "real": 0, "imagined": 0}}, "positive weight"),
    ({"capacity": {**ALL, "sim": 0}}, "replay.capacity.sim: expected at least 1 or null, got 0"),
    ({"windows": 0}, "replay.windows"),
    ({"discount": 1.5}, "replay.discount"),
])
def test_bad_settings_are_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        config(**changes)
    assert "\n" not in str(error.value)


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 9), context=st.integers(1, 4), horizon=st.integers(1, 6), terminated=st.booleans(),
       success=st.sampled_from(Success), seed=st.integers(0, 2**40))
def test_step_windows_are_what_the_obvious_reading_gives(make_trajectory, make_store, steps, context, horizon,
                                                         terminated, success, seed):
    trajectory = make_trajectory(0, steps, terminated=terminated, success=success, behaviour=Behaviour.UNKNOWN)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "s", [make_trajectory(9, 3, source=Source.REAL), trajectory])
        batch = StepSampler(store, sources={"sim": 1}, context=context, horizon=horizon, seed=seed).sample(2, 4)
    for j in range(4):
        assert batch.frames["front"].shape[1] == context + horizon == batch.action.shape[1] + 1
        # The last seen observation is never padded: it says where the window lies.
        present = int(batch.proprio[j, context - 1, 0])
        assert 0 <= present <= max(0, steps - horizon)
        for i in range(context + horizon):
            step = present - (context - 1) + i
            row = min(max(step, 0), steps)
            np.testing.assert_array_equal(batch.proprio[j, i], trajectory.proprio[row])
            for camera in trajectory.frames:
                np.testing.assert_array_equal(batch.frames[camera][j, i], trajectory.frames[camera][row])
            if i < context + horizon - 1:
                real = 0 <= step < steps
                assert bool(batch.mask[j, i]) == real
                np.testing.assert_array_equal(batch.action[j, i], trajectory.action[step] if real else np.zeros(3))
        assert not batch.aftermath.any()
        assert batch.instruction[j] == "push 0"


def test_step_windows_reach_both_ends(tmp_path, make_store, make_trajectory):
    store = make_store(tmp_path / "s", [make_trajectory(0, 5)])
    batch = StepSampler(store, sources={"sim": 1}, context=2, horizon=2, seed=0).sample(0, 64)
    assert set(batch.proprio[:, 1, 0].tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert not batch.mask.all()


def test_speed(tmp_path, spec, statistics, make_trajectory):
    """24 windows of 25 decisions, and 16 windows of 12 frames, at 64 pixels; an append of 8 episodes of 50 steps."""
    size = 64
    spec = type(spec)(**(vars(spec) | {"image_size": size, "cameras": ("front",)}))
    store = ReplayStore.create(tmp_path / "s", spec=spec, statistics=statistics, embodiment="arm")
    decisions, steps, appends = [], [], []
    for i in range(10):
        group = [make_trajectory(8 * i + j, 50, size=size, cameras=("front",), decision=np.ones(50)) for j in range(8)]
        start = time.process_time()
        store.append(group)
        appends.append(time.process_time() - start)
    learner = DecisionSampler(store, config(windows=24, decisions=25), chunk=4, seed=0)
    model = StepSampler(store, sources={"sim": 1}, context=2, horizon=10, seed=0)
    for step in range(20):
        start = time.process_time()
        learner.sample(step)
        middle = time.process_time()
        model.sample(step, 16)
        decisions.append(middle - start)
        steps.append(time.process_time() - middle)
    print(f"append {min(appends):.4f} s, decisions {min(decisions):.4f} s, steps {min(steps):.4f} s")
    assert min(appends) < 0.15
    assert min(decisions) < 0.01
    assert min(steps) < 0.01
