"""Outcomes from a success model whose opinion is known."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.store import ReplayStore
from data.types import Source, Success, UserError
from tests import examples
from world_model.label import judge_episode, label_outcomes, success_probability
from world_model.rollout import outcome
from world_model.success import SuccessModel


class Brightness(SuccessModel):
    """Success is as probable as the newest frame is bright."""

    def forward(self, frames, proprio, tokens):
        return frames[:, 1].float().mean((1, 2, 3)) / 255


def model():
    return Brightness(proprio_dim=2, proprio_mean=(0.0, 0.0), proprio_std=(1.0, 1.0))


def episode(brightness, success, *, source=Source.REAL):
    """``brightness`` of the frames after each step; the first frame is bright, which does not count."""
    steps = len(brightness)
    frames = np.broadcast_to(np.array([1.0, *brightness])[:, None, None, None] * 255, (steps + 1, 16, 16, 3))
    done = np.arange(steps) == steps - 1
    yes = success is Success.YES
    return dataclasses.replace(
        examples.trajectory(1, steps, source), frames={"front": frames.astype(np.uint8)}, success=success,
        terminated=done & yes, truncated=done & (not yes), reward=(done & yes).astype(np.float32))


@pytest.fixture
def store(tmp_path):
    replay = ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    replay.append([
        episode([0.2, 0.8, 0.3, 0.8, 0.9, 0.1], Success.UNKNOWN),  # confirmed in the fifth frame
        episode([0.2, 0.8, 0.3], Success.UNKNOWN),                 # seen once
        episode([0.2, 0.3, 0.4], Success.UNKNOWN),                 # never
        episode([0.2, 0.3, 0.8, 0.8], Success.YES),                # right
        episode([0.2, 0.8, 0.8, 0.3], Success.YES),                # right, one step early
        episode([0.2, 0.8, 0.8], Success.NO),                      # a false yes
        episode([0.2, 0.1], Success.YES),                          # a false no
        episode([0.2, 0.7], Success.NO)])                          # undecided
    replay.append([episode([0.9, 0.9], Success.UNKNOWN, source=Source.IMAGINED),
                   episode([0.9, 0.9], Success.NO, source=Source.IMAGINED)])
    return replay


def test_the_rule_of_imagination_decides(store):
    report = label_outcomes(store, model(), threshold=0.5, success_frames=2)
    assert (report.yes, report.no, report.left) == (1, 1, 1)
    assert (report.checked, report.agreed, report.false_yes, report.false_no) == (5, 2, 1, 1)
    assert report.steps_off == pytest.approx((0 + 1) / 2)
    assert "agrees on 2 of 5 (1 false yes, 1 false no, success 0.5 steps off)" in report.lines()[1]
    assert store.episodes.success.tolist()[:3] == ["unknown"] * 3
    seen = store.with_outcome_labels()
    assert seen.episodes.success.tolist() == ["yes", "unknown", "no", "yes", "yes", "no", "yes", "no", "unknown", "no"]
    assert seen.trajectory(0).terminated.tolist() == [False, False, False, False, True, False]
    rule = seen.provenance(0)["outcome_label"]
    assert (rule["threshold"], rule["success_frames"], len(rule["model"])) == (0.5, 2, 16)
    assert rule["probability"] == pytest.approx(0.9, abs=0.01)
    again = label_outcomes(store, model(), threshold=0.95, success_frames=1)  # replaces the first
    assert (again.yes, again.no, again.left) == (0, 3, 0)
    assert store.with_outcome_labels().episodes.success.tolist()[:3] == ["no"] * 3


def test_probabilities_are_of_the_frames_after_each_step_however_many_there_are(store, monkeypatch):
    whole = success_probability(store, model(), 0)
    np.testing.assert_allclose(whole, [0.2, 0.8, 0.3, 0.8, 0.9, 0.1], atol=0.01)
    monkeypatch.setattr("world_model.label.FRAMES", 4)
    np.testing.assert_allclose(success_probability(store, model(), 0), whole, atol=1e-6)


def test_a_model_of_another_robot_is_refused(store):
    with pytest.raises(UserError, match=r"fitted with proprio_dim=4, the store .* has 2; fit one with"):
        label_outcomes(store, Brightness(), threshold=0.5, success_frames=2)


def test_an_unknown_outcome_says_nothing_of_any_frame(store):
    for index, known in ((0, False), (3, True), (5, True)):
        shown, before = outcome(store, index)
        assert (shown | before).any() == known


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 4))
def test_judging_by_definition(counts, frames):
    label = judge_episode(np.where(counts, 0.7, 0.2), threshold=0.5, success_frames=frames)
    ends = [i for i in range(frames - 1, len(counts)) if all(counts[i - frames + 1 : i + 1])]
    if ends:
        assert (label.success, label.step) == (Success.YES, ends[0])
    else:
        assert (label.success, label.step) == (Success.UNKNOWN if any(counts) else Success.NO, -1)


def test_the_model_is_not_changed(store):
    own = model()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    label_outcomes(store, own, threshold=0.5, success_frames=2)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in before.items())
