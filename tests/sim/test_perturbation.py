from __future__ import annotations

import contextlib
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.types import UserError
from sim.metaworld import MetaWorldConfig
from sim.perturbation import FACTORS, RANGES, Perturbation, draw, ranges
from sim.pusht import PushTConfig
from sim.task import Task
from sim.tasks import HELD_OUT, PHRASINGS, TASKS, phrasings
from sim.vector import VectorEnv


def build(task: str, **config) -> Task:
    made = MetaWorldConfig(**config)
    made.prepare()
    return made.make(task)


def first_two(task: str, action=(1.0, 0, 0, 0), **factors):
    """First step of an episode, and the second after the same action twice."""
    made = build(task, perturbation=Perturbation(**factors))
    with contextlib.closing(made):
        first = made.reset(1)
        made.step(np.array(action))
        return first, made.step(np.array(action))


@pytest.fixture(scope="module")
def nominal():
    return first_two("drawer-close-v3")


@pytest.mark.sim
@pytest.mark.parametrize("factors", [
    {"light": (0.5, 0.5, 0.5)}, {"light_turn": 40.0}, {"camera_shift": (0.0, 0.1, 0.0)},
    {"camera_turn": (0.0, 5.0, 0.0)}, {"zoom": 1.2}, {"table_colour": (0.5, 0.7, 1.0)}, {"table_texture": "plain"},
    {"table_texture": "checker"}, {"object_colour": (0.3, 0.3, 1.0)}], ids=lambda factors: next(iter(factors)))
def test_what_is_seen_changes_and_what_happens_does_not(nominal, factors):
    seen = first_two("drawer-close-v3", **factors)
    assert np.abs(seen[0].frame.astype(int) - nominal[0].frame).mean() > 0.5
    for one, other in zip(seen, nominal, strict=True):
        assert np.array_equal(one.proprio, other.proprio)


@pytest.mark.sim
def test_dynamics_and_latency_change_what_happens(nominal):
    moved = nominal[1].proprio[0] - nominal[0].proprio[0]
    slow, late = (first_two("drawer-close-v3", **factors)[1].proprio[0] - nominal[0].proprio[0]
                  for factors in ({"gain": 0.5}, {"latency": 1}))
    assert 0.2 * moved < slow < 0.8 * moved
    assert 0 < late < 0.7 * moved
    for factors in ({"damping": 3.0}, {"mass": 1.5}):
        changed = first_two("drawer-close-v3", **factors)
        assert np.array_equal(changed[0].frame.shape, nominal[0].frame.shape)
        assert not np.array_equal(changed[1].proprio, nominal[1].proprio), factors


@pytest.mark.sim
def test_objects_begin_elsewhere_by_exactly_the_shift():
    def puck(shift):
        task = build("push-v3", observation="state", reward="dense", perturbation=Perturbation(object_shift=shift))
        return task.reset(3).proprio[4:7]

    assert puck((0.03, -0.02)) - puck((0.0, 0.0)) == pytest.approx([0.03, -0.02, 0], abs=1e-3)


@pytest.mark.sim
def test_friction_reaches_the_simulation():
    made, plain = build("push-v3", perturbation=Perturbation(friction=0.5)), build("push-v3")
    with contextlib.closing(made), contextlib.closing(plain):
        made.reset(1)
        assert np.allclose(made._env.model.geom_friction[:, 0], 0.5 * plain._env.model.geom_friction[:, 0])


@pytest.mark.sim
def test_after_a_perturbed_episode_a_nominal_one_is_bit_identical(nominal):
    everything = Perturbation(
        gain=0.8, damping=1.5, friction=0.7, mass=1.2, latency=2, camera_shift=(0.1, 0, 0), camera_turn=(3, 3, 3),
        zoom=1.1, light=(0.5, 0.6, 0.7), light_turn=30, table_colour=(0.5, 1, 1), table_texture="checker",
        object_colour=(0.2, 1, 1), object_shift=(0.02, 0.02), phrasing="wordy")
    assert set(everything.changes) == FACTORS
    task = build("drawer-close-v3")
    with contextlib.closing(task):
        task.perturb(everything)
        task.reset(1)
        task.step(np.ones(4))
        task.perturb(Perturbation())
        first = task.reset(1)
        task.step(np.array([1.0, 0, 0, 0]))
        second = task.step(np.array([1.0, 0, 0, 0]))
    for one, other in zip((first, second), nominal, strict=True):
        assert np.array_equal(one.frame, other.frame)
        assert np.array_equal(one.proprio, other.proprio)
        assert one.instruction == other.instruction


@pytest.mark.sim
def test_an_environment_is_perturbed_from_the_next_reset_on_and_says_so():
    config = MetaWorldConfig(image_size=32, max_episode_steps=4)
    with contextlib.closing(VectorEnv(tasks=["reach-v3"], num_envs=2, workers=1, config=config)) as env:
        everything = {"reset_mask": np.ones(2, bool)}
        usual, info = env.reset(seed=[1, 2], options=everything)
        env.perturb(Perturbation(light=(0.4, 0.4, 0.4), phrasing="held_out"))
        still, *_ = env.step(np.zeros((2, 4), np.float32))
        dark, other = env.reset(seed=[1, 2], options=everything)
        assert still["frames"]["workspace"].mean() > 1.2 * dark["frames"]["workspace"].mean()
        assert np.array_equal(usual["proprio"], dark["proprio"])
        assert set(other["instruction"]) <= set(HELD_OUT["reach-v3"])
        assert set(info["instruction"]) <= set(PHRASINGS["reach-v3"])
        assert env.provenance["config"]["perturbation"]["light"] == (0.4, 0.4, 0.4)


@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_a_seed_draws_the_same_whatever_else_varies(seed, other):
    few = draw(Perturbation(), {"light": (0.5, 1.5)}, seed)
    many = draw(Perturbation(zoom=1.1), {**RANGES["mild"], "light": (0.5, 1.5), "latency": (0, 2)}, seed)
    assert few.light == many.light
    assert few.zoom == 1
    assert many.zoom == 1.1
    assert all(0.5 <= value <= 1.5 for value in few.light)
    assert many.latency in (0, 1, 2)
    assert seed == other or draw(Perturbation(), {"light": (0.5, 1.5)}, other).light != few.light


@pytest.mark.sim
def test_randomised_episodes_differ_by_seed_alone():
    config = MetaWorldConfig(image_size=32, max_episode_steps=4, randomise={"camera_shift": [-0.05, 0.05]})
    with contextlib.closing(VectorEnv(tasks=["reach-v3"], num_envs=2, workers=0, config=config)) as env:
        everything = {"reset_mask": np.ones(2, bool)}
        one, _ = env.reset(seed=[5, 6], options=everything)
        two, _ = env.reset(seed=[6, 5], options=everything)
    frames, swapped = one["frames"]["workspace"], two["frames"]["workspace"]
    assert np.array_equal(frames[0], swapped[1])
    assert np.array_equal(frames[1], swapped[0])
    far = [draw(Perturbation(), config.ranges(), seed).camera_shift for seed in (5, 6)]
    assert far[0] != far[1]


def test_every_task_has_held_out_sentences():
    for task in (*TASKS, "pusht"):
        usual, held_out, wordy = (set(phrasings(task, kind)) for kind in ("usual", "held_out", "wordy"))
        assert len(held_out) >= 2
        assert len(wordy) >= 2
        assert not usual & (held_out | wordy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Perturbation(gain=0), "gain must be above 0"),
        (lambda: Perturbation(latency=-1), "latency must be 0 or more"),
        (lambda: Perturbation(light=0.5), "light must be 3 numbers, got 0.5"),
        (lambda: Perturbation(light=(1, 1, -1)), "light must be 0 or more"),
        (lambda: Perturbation(phrasing="loud"), "phrasing must be one of usual, held_out, wordy, got 'loud'"),
        (lambda: PushTConfig(perturbation=Perturbation(zoom=2)), "zoom does not exist in PushT; it has latency, li"),
        (lambda: PushTConfig(randomise={"friction": [0, 1]}), "friction does not exist in PushT"),
        (lambda: MetaWorldConfig(randomise={"fog": [0, 1]}), "fog is not known; it has camera_shift"),
        (lambda: MetaWorldConfig(randomise={"mass": [2, 1]}), "randomise mass: expected [lowest, highest], got [2, 1]"),
        (lambda: MetaWorldConfig(randomise={"mass": [-1, 1]}), "mass must be above 0, got -1"),
        (lambda: MetaWorldConfig(randomise={"phrasing": [0, 1]}), "phrasing: it is no number"),
        (lambda: MetaWorldConfig(randomise="wild"), "randomise must be one of mild"),
    ],
)
def test_a_wrong_perturbation_is_one_line(make, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_named_range_is_cut_to_what_a_simulator_has():
    assert set(ranges("mild", PushTConfig.factors, simulator="PushT")) == set(RANGES["mild"]) & PushTConfig.factors
    assert dataclasses.asdict(PushTConfig(randomise="mild"))["randomise"] == "mild"
