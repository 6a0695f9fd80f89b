"""Estimated behaviour: held out, calibrated, close to the truth where the truth is known."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.store import ReplayStore
from data.types import Behaviour, Source
from tests import examples
from wm_rl.behaviour import hold_out, label_unknown_behaviour, without
from wm_rl.calibration import expected_calibration_error, fit_temperature
from wm_rl.cloning import CloningConfig, clone

CPU = torch.device("cpu")


def make_store(folder, logs):
    store = ReplayStore.create(folder, spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    store.append(logs)
    return store


def unlabelled(count, steps=7):
    return [examples.trajectory(seed, steps, Source.REAL, behaviour=Behaviour.UNKNOWN) for seed in range(count)]


def said_of(policy, t):
    """Logits ``[t, a, v]`` and tokens of an episode, looking at every second step: an independent pass."""
    steps = len(t)
    with torch.inference_mode():
        looked = policy({"front": torch.from_numpy(t.frames["front"][:steps:2])}, torch.from_numpy(t.proprio[:steps:2]),
                        policy.words([t.instruction] * len(range(0, steps, 2))))
    return looked.logits.flatten(0, 1)[:steps], policy.discretise(torch.from_numpy(t.action))


def test_labels_are_the_clones_at_the_temperature_of_what_it_did_not_see(tmp_path):
    logs = unlabelled(6)
    step = np.arange(7)  # decided after its fourth step: what follows counts for nothing
    logs[2] = dataclasses.replace(logs[2], terminated=step == 3, truncated=step < 0, reward=(step >= 3).astype("f4"))
    store = make_store(tmp_path / "logs.zarr", logs)
    store.append([examples.trajectory(3, 5, Source.SIM)])
    policy, held_out = examples.policy(), np.array([2, 5])
    report = label_unknown_behaviour(policy, store, held_out)
    assert report.labelled == 6
    acting = {2: 4, 5: 7}
    logits = torch.cat([said_of(policy, logs[i])[0][: acting[i]] for i in (2, 5)]).flatten(0, 1)
    token = torch.cat([said_of(policy, logs[i])[1][: acting[i]] for i in (2, 5)]).flatten()
    found, scale = report.calibration, fit_temperature(logits, token)
    assert (found.episodes, found.tokens) == (2, 11 * 3)
    assert found.temperature == pytest.approx(scale, rel=1e-3)
    raw = logits.log_softmax(-1)[range(33), token]
    scaled = (logits / scale).log_softmax(-1)[range(33), token]
    assert found.log_likelihood == pytest.approx(scaled.mean().item(), abs=1e-4)
    assert found.log_likelihood_uncalibrated == pytest.approx(raw.mean().item(), abs=1e-4)
    assert found.log_likelihood_uniform == pytest.approx(np.log(1 / 5))
    counts = np.ones((3, 5))
    for i in (0, 1, 3, 4):
        for row in said_of(policy, logs[i])[1].numpy():
            counts[range(3), row] += 1
    marginal = np.log(counts / counts.sum(1, keepdims=True))[np.tile(range(3), 11), token]
    assert found.log_likelihood_marginal == pytest.approx(marginal.mean(), abs=1e-5)
    assert found.calibration_error_uncalibrated == pytest.approx(expected_calibration_error(logits, token), abs=1e-5)
    ratio = (raw - scaled).double().exp().numpy()
    assert found.effective_share == pytest.approx(ratio.sum() ** 2 / (33 * (ratio**2).sum()), rel=1e-3)
    per_step = ratio.reshape(11, 3).prod(1)  # decisions of two steps: 4 = 2 + 2 and 7 = 2 + 2 + 2 + 1
    joint = np.array([*per_step[:4].reshape(2, 2).prod(1), *per_step[4:10].reshape(3, 2).prod(1), per_step[10]])
    assert found.effective_share_decision == pytest.approx(joint.sum() ** 2 / (6 * (joint**2).sum()), rel=1e-3)
    for i in range(6):
        read, (logits, token) = store.trajectory(i), said_of(policy, logs[i])
        assert read.behaviour is Behaviour.CLONED
        assert read.decision.tolist() == [s % 2 == 0 and s < (4 if i == 2 else 7) for s in range(7)]
        expected = (logits / scale).log_softmax(-1).gather(-1, token[..., None])[..., 0]
        np.testing.assert_allclose(read.log_prob, expected, atol=2e-3)
    assert store.trajectory(6).behaviour is Behaviour.LOGGED
    assert label_unknown_behaviour(policy, store, held_out).labelled == 0


def test_every_segment_gets_the_labels_of_its_own_episodes(tmp_path):
    logs = unlabelled(3, steps=7)
    shown = [examples.trajectory(seed, 5, Source.SIM, behaviour=Behaviour.UNKNOWN) for seed in range(3, 7)]
    store = make_store(tmp_path / "logs.zarr", logs)
    store.append(shown)
    policy = examples.policy()
    assert label_unknown_behaviour(policy, store, np.array([], int)).labelled == 7
    for index, recorded in enumerate([*logs, *shown]):
        labelled = store.trajectory(index)
        logits, token = said_of(policy, recorded)
        assert labelled.behaviour is Behaviour.CLONED
        assert np.array_equal(labelled.action_token, token.numpy())
        expected = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0].numpy()
        np.testing.assert_allclose(labelled.log_prob, expected, atol=1e-5)


def test_a_clone_never_sees_what_is_held_out(tmp_path):
    config = CloningConfig(steps=5, batch=16, learning_rate=1e-3, sources={"real": 1.0})
    weights = []
    for name, action in (("one", -1.0), ("other", 1.0)):
        logs = unlabelled(6)
        store = make_store(tmp_path / name, logs)
        held_out = hold_out(store, 0.3, seed=1)
        changed = [dataclasses.replace(t, action=np.full_like(t.action, action)) if i in held_out else t
                   for i, t in enumerate(logs)]
        policy, again = examples.policy(), make_store(tmp_path / f"{name} changed", changed)
        clone(policy, without(again, held_out), config, seed=0, device=CPU, log=lambda step, metrics: None)
        weights.append(policy.state_dict())
    assert len(held_out) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_one_episode_alone_is_labelled_and_nothing_is_claimed(tmp_path):
    store = make_store(tmp_path / "logs.zarr", unlabelled(1))
    held_out = hold_out(store, 0.5, seed=0)
    report = label_unknown_behaviour(examples.policy(), store, held_out)
    assert (len(held_out), report.labelled, report.calibration) == (0, 1, None)
    assert np.isfinite(store.trajectory(0).log_prob).all()
    assert "nothing was held out" in report.lines()[1]


@settings(max_examples=25, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 5)] * 3), share=st.floats(0, 0.99), seed=st.integers(0, 2**31))
def test_a_share_of_every_source_is_held_out(tmp_path_factory, counts, share, seed):
    store = ReplayStore.create(tmp_path_factory.mktemp("s") / "s", spec=examples.SPEC, statistics=examples.STATISTICS,
                               embodiment="toy")
    for source, count in zip(Source, counts, strict=True):
        store.append([examples.trajectory(0, 2, source, behaviour=behaviour) for behaviour in
                      (Behaviour.LOGGED, *[Behaviour.UNKNOWN] * count)])
    held_out = hold_out(store, share, seed)
    assert held_out.tolist() == hold_out(store, share, seed).tolist() == sorted(set(held_out.tolist()))
    assert (store.episodes.behaviour[held_out] == Behaviour.UNKNOWN.value).all()
    for source, count in zip(Source, counts, strict=True):
        own = int((store.episodes.source[held_out] == source.value).sum())
        assert own == (0 if share == 0 or count < 2 else max(1, round(share * count)))
        assert len(without(store, held_out)) == len(store) - len(held_out)


@pytest.fixture(scope="module")
def known_behaviour():
    """Logs of somebody whose token probabilities are known: they depend on whether the frame is bright; it is noisy."""
    draw = np.random.default_rng(0)
    table = draw.dirichlet(np.full(5, 0.8), size=(2, 3))  # [bright, dimension, bin]
    logs, truth = [], []
    for seed in range(40):
        t = examples.trajectory(seed, 8, Source.REAL, behaviour=Behaviour.UNKNOWN)
        bright = draw.integers(0, 2, 4).repeat(2)  # both steps of a chunk
        token = np.array([[draw.choice(5, p=table[b, a]) for a in range(3)] for b in bright])
        frames = draw.integers(0, 120, (9, 16, 16, 3)) + 120 * np.append(bright, 0)[:, None, None, None]
        logs.append(dataclasses.replace(t, frames={"front": frames.astype(np.uint8)}, terminated=np.zeros(8, bool),
                                        action=(token / 2 - 1).astype(np.float32)))
        truth.append(np.log(np.take_along_axis(table[bright], token[..., None], axis=2)[..., 0]))
    return logs, np.stack(truth)


def test_calibrated_labels_come_closer_to_the_truth(known_behaviour, tmp_path):
    logs, truth = known_behaviour
    config = CloningConfig(steps=250, batch=64, learning_rate=3e-3, sources={"real": 1.0})
    store, policy = make_store(tmp_path / "logs.zarr", logs), examples.policy()
    held_out = hold_out(store, 0.2, seed=0)
    clone(policy, without(store, held_out), config, seed=0, device=CPU, log=lambda step, metrics: None)
    report = label_unknown_behaviour(policy, store, held_out).calibration
    labels = np.stack([store.trajectory(i).log_prob for i in range(len(logs))])
    said = [said_of(policy, t) for t in logs]
    plain = np.stack([logits.log_softmax(-1).gather(-1, token[..., None])[..., 0].numpy() for logits, token in said])
    seen = np.setdiff1d(np.arange(len(logs)), held_out)

    assert plain[seen].mean() > truth[seen].mean() + 0.05  # it knows by heart what it learned
    assert report.temperature > 1.05
    assert np.abs(labels - truth).mean() < np.abs(plain - truth).mean()
    assert abs((labels - truth)[seen].mean()) < abs((plain - truth)[seen].mean())
    assert np.abs(labels - truth)[held_out].mean() < np.abs(plain - truth)[held_out].mean()
    assert report.log_likelihood > report.log_likelihood_uncalibrated
    assert report.log_likelihood > report.log_likelihood_marginal > report.log_likelihood_uniform
    assert report.calibration_error < report.calibration_error_uncalibrated
