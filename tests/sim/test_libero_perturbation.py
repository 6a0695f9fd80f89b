"""Each factor on the real LIBERO: it changes what it should, and nothing else."""

import contextlib
import os
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.libero.phrasing import can_be_phrased, phrase
from sim.perturbation import FACTORS, Perturbation
from sim.task import unpack
from tests.sim.test_libero import GOAL, libero, real_libero

EVERYTHING = {"gain": 0.8, "damping": 1.5, "friction": 0.7, "mass": 1.2, "latency": 2, "camera_shift": (0.1, 0, 0),
              "camera_turn": (3, 3, 3), "zoom": 1.1, "light": (0.5, 0.6, 0.7), "light_turn": 30.0,
              "table_colour": (0.5, 1, 1), "table_texture": "checker", "object_colour": (0.2, 1, 1),
              "object_shift": (0.02, 0.02), "phrasing": "wordy"}
BOTH = {"reset_mask": np.ones(2, bool)}
MOVES = np.random.default_rng(0).uniform(-1, 1, (5, 1, 7)).astype(np.float32).repeat(2, 1)
TRAINING = (1 << 30) + 3
"""A seed whose episode begins where LIBERO's description places things at random."""
REST = np.array([[0, 0, 0, 0, 0, 0, -1]], np.float32).repeat(2, 0)
THINGS = slice(10, 38)
"""Of a snapshot's state: after the time and the robot's nine joints, place (m) and quaternion of the four things."""


@pytest.fixture(scope="module")
def env():
    """Where furniture stands on a table."""
    with contextlib.closing(libero(GOAL, tasks=(6,), image_size=32, max_episode_steps=40)) as made:
        yield made


@pytest.fixture(scope="module")
def nominal(env):
    env.perturb(Perturbation())
    return episode(env)


def episode(env, moves=MOVES, seed=3):
    """What both rows show; instructions; and row 0's state in the end and as it began."""
    observation, info = env.reset(seed=[seed, seed], options=BOTH)
    start = unpack(env.snapshot(0))
    seen = [observation, *(env.step(move)[0] for move in moves)]
    return {**{camera: np.stack([each["frames"][camera][0] for each in seen]) for camera in env.spec.cameras},
            "proprio": np.stack([each["proprio"][0] for each in seen]), "instruction": info["instruction"][0],
            "start": start, "end": unpack(env.snapshot(0))}


def perturbed(env, **factors):
    env.perturb(Perturbation(**factors))
    return episode(env)


def assert_same(one, other, *names):
    for name in names or ("agentview", "wrist", "proprio", "instruction"):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def difference(one, other, camera="agentview"):
    """Mean of the first pictures', of 255."""
    return np.abs(one[camera][0].astype(int) - other[camera][0]).mean()


@real_libero
@pytest.mark.parametrize("factors", [
    {"light": (0.5, 0.5, 0.5)}, {"light_turn": 25.0}, {"table_colour": (0.5, 0.7, 1.0)}, {"table_texture": "plain"},
    {"table_texture": "checker"}, {"object_colour": (0.3, 0.3, 1.0)}, {"camera_shift": (0.0, 0.05, 0.0)},
    {"camera_turn": (0.0, 3.0, 0.0)}, {"zoom": 1.1}], ids=lambda factors: next(iter(factors)))
def test_what_is_seen_changes_and_what_happens_does_not(env, nominal, factors):
    seen = perturbed(env, **factors)
    assert difference(seen, nominal) > 0.5
    if {"zoom", "camera_shift", "camera_turn"} & set(factors):
        assert_same(seen, nominal, "wrist")
    else:
        assert difference(seen, nominal, "wrist") > 0.5
    assert_same(seen, nominal, "proprio", "instruction")
    np.testing.assert_array_equal(seen["end"]["state"], nominal["end"]["state"])


@real_libero
@pytest.mark.parametrize("factors", [{"damping": 3.0}, {"friction": 0.3}, {"mass": 1.5}],
                         ids=lambda factors: next(iter(factors)))
def test_dynamics_change_what_happens_and_not_how_it_looks(env, nominal, factors):
    changed = perturbed(env, **factors)
    assert (changed["end"]["state"] != nominal["end"]["state"]).any()
    assert difference(changed, nominal) < 1, "all has come to rest in the same places"
    assert_same(changed, nominal, "instruction")


@real_libero
def test_gain_is_how_far_the_hand_goes(env, nominal):
    ahead = np.array([[0, 0.5, 0.5, 0, 0, 0, -1]], np.float32).repeat(2, 0)
    paths = []
    for gain in (0.5, 1.0, 1.5):
        env.perturb(Perturbation(gain=gain))
        proprio = episode(env, [ahead] * 6)["proprio"]
        paths.append(np.linalg.norm((proprio[-1] - proprio[0])[:3]))
    np.testing.assert_allclose(np.divide(paths, paths[1]), [0.5, 1.0, 1.5], atol=0.1)


@real_libero
@pytest.mark.parametrize("latency", [1, 3])
def test_a_late_action_is_the_same_action_after_as_many_of_rest(env, latency):
    env.perturb(Perturbation())
    expected = episode(env, [*[REST] * latency, *MOVES])
    env.perturb(Perturbation(latency=latency))
    assert_same(episode(env, [*MOVES, *[REST] * latency]), expected)


@real_libero
@pytest.mark.parametrize("seed", [3, TRAINING])
def test_objects_furniture_and_regions_begin_elsewhere_by_the_shift(env, seed):
    env.perturb(Perturbation())
    nominal = episode(env, [], seed)
    env.perturb(Perturbation(object_shift=(0.04, -0.03)))
    shifted = episode(env, [], seed)
    moved = (shifted["start"]["state"] - nominal["start"]["state"])[THINGS].reshape(4, 7)
    np.testing.assert_allclose(moved[:, :3], [[0.04, -0.03, 0]] * 4, atol=2e-3)
    np.testing.assert_allclose(shifted["proprio"][0], nominal["proprio"][0], atol=2e-3)
    for name, count in (("body_pos", 3), ("site_pos", 8)):  # cabinet, stove and rack; the task's regions of the table
        change = shifted["start"][name] - nominal["start"][name]
        change = change[np.abs(change).max(axis=1) > 0]
        np.testing.assert_allclose(change, [[0.04, -0.03, 0]] * count, atol=1e-6)


@real_libero
def test_the_instruction_is_put_in_other_words(env, nominal):
    said = {kind: perturbed(env, phrasing=kind) for kind in ("held_out", "wordy")}
    assert nominal["instruction"] == "put the cream cheese in the bowl"
    assert said["held_out"]["instruction"] == "lay the cream cheese in the bowl"
    assert said["wordy"]["instruction"].endswith("for me lay the cream cheese in the bowl")
    for each in said.values():
        assert_same(each, nominal, "agentview", "wrist", "proprio")


@real_libero
def test_it_has_every_factor_and_after_all_of_them_nominal_is_nominal_bit_for_bit(env, nominal):
    assert env.factors == set(EVERYTHING) == FACTORS
    assert (perturbed(env, **EVERYTHING)["agentview"] != nominal["agentview"]).any()
    again = perturbed(env)
    assert_same(again, nominal)
    np.testing.assert_array_equal(again["end"]["state"], nominal["end"]["state"])


@real_libero
def test_a_snapshot_goes_on_under_what_it_was_taken_under(env):
    env.perturb(Perturbation(**EVERYTHING))
    _, info = env.reset(seed=[3, 3], options=BOTH)
    for move in MOVES[:2]:
        env.step(move)
    snapshot = env.snapshot(0)
    first = [env.step(move)[0] for move in MOVES[2:]]
    env.perturb(Perturbation())
    env.reset(seed=[4, 4], options=BOTH)
    for row in (0, 1):
        _, restored = env.restore(row, snapshot)
        assert restored["instruction"][row] == info["instruction"][0]
        for seen, again in zip(first, (env.step(move)[0] for move in MOVES[2:]), strict=True):
            np.testing.assert_array_equal(seen["frames"]["agentview"][0], again["frames"]["agentview"][row])
            np.testing.assert_array_equal(seen["proprio"][0], again["proprio"][row])


@real_libero
def test_a_process_that_was_killed_is_followed_by_one_that_is_perturbed_alike(env):
    seen = perturbed(env, **EVERYTHING)
    env.reset(seed=[3, 4], options=BOTH)
    os.kill(env._parts[0].process._child.pid, signal.SIGKILL)
    assert env.step(MOVES[0])[3].all()
    assert env.provenance["perturbation"] == Perturbation(**EVERYTHING).changes
    assert_same(episode(env), seen)


@real_libero
def test_a_camera_that_nobody_looks_through_cannot_be_moved():
    with contextlib.closing(libero(num_envs=1, cameras=["wrist"], image_size=16)) as env:
        assert env.factors == FACTORS - {"camera_shift", "camera_turn", "zoom"}


@pytest.mark.parametrize(("sentence", "others"), [
    ("pick up the milk and place it in the basket", {"grab the milk and set it in the basket",
                                                      "take the milk and leave it in the basket"}),
    ("turn on the stove and put the moka pot on it", {"switch on the stove and set the moka pot on it",
                                                      "start the stove and lay the moka pot on it"}),
    ("close the microwave", {"shut the microwave", "push shut the microwave"})])
def test_sentences_in_other_words(sentence, others):
    assert can_be_phrased(sentence)
    assert {phrase(sentence, "held_out", seed) for seed in range(4)} == others
    assert phrase(sentence, "usual", 1) == sentence


def test_a_sentence_that_asks_for_something_else_has_no_other_words():
    assert not can_be_phrased("whisk the eggs until they are done")


@given(st.lists(st.sampled_from(["pick up", "the bowl", "on", "place", "it", "open", "turn on", "stack", "opened"])),
       st.integers(0, 2**62))
def test_phrasing_keeps_every_word_that_asks_for_nothing(words, seed):
    asked = {"pick up", "place", "open", "turn on", "stack"}
    put = phrase(" ".join(words), "held_out", seed)
    assert (put == " ".join(words)) == (not asked & set(words))
    kept = [word for word in words if word not in asked]
    assert [word for word in put.split() if word in {"the", "bowl", "it", "opened"}] == [
        word for each in kept for word in each.split() if word != "on"]
