"""The update: against an independent formula, in pieces, across a resume."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.fabric import Fabric

from data.sampler import DecisionSampler
from data.types import Source, UserError
from tests import examples
from wm_rl.objectives import Gipo, SecondMoment
from wm_rl.policy import TinyVLA
from wm_rl.staleness import BUCKETS, staleness_metrics, staleness_sums


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def sampler(tmp_path):
    return DecisionSampler(examples.store(tmp_path / "replay.zarr"), examples.REPLAY, chunk=2, seed=3)


def test_gradient_is_the_sum_written_out(fabric, sampler):
    """A slow, separate computation of the whole loss: loops over windows, decisions and tokens."""
    config = dataclasses.replace(examples.LEARNER, entropy_coefficient=0.0, kl_coefficient=0.0, max_gradient_norm=1e9)
    batch = sampler.sample(0)
    model = examples.policy(0)
    words = model.words(batch.instruction)

    def look(j, frames, proprio):
        return model({"front": frames[None]}, proprio[None], words[j : j + 1])

    decisions, advantages = [], []
    for j in range(len(batch.mask)):
        n = int(batch.mask[j].sum())
        seen = [look(j, batch.frames["front"][j, i], batch.proprio[j, i]) for i in range(n)]
        after = look(j, batch.final_frames["front"][j], batch.final_proprio[j]).value.item()
        following, running, own = (0.0 if batch.terminated[j] else after), 0.0, []
        for i in reversed(range(n)):
            value, gamma = seen[i].value.item(), batch.discount[j, i].item()
            running = batch.reward[j, i].item() + gamma * following - value + gamma * config.trace * running
            following = value
            own.insert(0, running)
        decisions += [(j, i, seen[i]) for i in range(n)]
        advantages += own
    advantage = torch.tensor(advantages)
    deviation = advantage.double().std(correction=0)
    tokens = int(batch.token_mask.sum()) * 3
    loss = torch.zeros(())
    for (j, i, output), a in zip(decisions, advantage, strict=True):
        log_probs = output.logits[0].log_softmax(-1)
        trust = torch.exp(-batch.uncertainty[j, i] / examples.TRUST.imagined_temperature)
        for k in range(2):
            if not batch.token_mask[j, i, k]:
                continue
            for d in range(3):
                log_prob = log_probs[k, d, batch.token[j, i, k, d]]
                x = (log_prob - batch.log_prob[j, i, k, d]).detach()
                w = torch.exp(-0.5 * (x / 0.5) ** 2)
                ratio = torch.exp(log_prob - batch.log_prob[j, i, k, d])
                loss = loss - w * ratio * (a / deviation).float() * trust / tokens
        target = a + output.value.item()
        loss = loss + 0.5 * (output.value[0] - target) ** 2 / len(decisions)
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    learner = examples.learner(fabric, config)
    learner.update(batch)
    for parameter, gradient in zip(learner.policy.parameters(), expected, strict=True):
        other = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-6)


def test_resumed_equals_uninterrupted(fabric, sampler):
    whole = examples.learner(fabric)
    for step in range(4):
        whole.update(sampler.sample(step))
    first = examples.learner(fabric)
    for step in range(2):
        first.update(sampler.sample(step))
    state = first.state_dict()
    second = examples.learner(fabric)
    second.load_state_dict(state)
    for step in range(2, 4):
        second.update(sampler.sample(step))
    assert second.policy.version == whole.policy.version == 4
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], value), name


@pytest.mark.parametrize("objective", [Gipo(beta=0.5), SecondMoment(limit=0.04)], ids=["gipo", "second_moment"])
@given(pieces=st.integers(2, 8), joint=st.booleans())
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_of_a_batch_make_its_gradient(fabric, sampler, objective, pieces, joint):
    """Whatever the objective asks of the batch as a whole, and however uneven the pieces are."""
    gradients = []
    for count in (1, pieces):
        config = dataclasses.replace(examples.LEARNER, micro_batches=count, ratio="joint" if joint else "token")
        learner = examples.learner(fabric, config)
        learner.objective = objective
        calls = []
        learner.policy.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        metrics = learner.update(sampler.sample(0))
        assert len(calls) == (1 if count == 1 else 2 * count)
        gradients.append([parameter.grad for parameter in learner.policy.parameters()])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)
    assert metrics["gradient_norm"] > 0


def test_a_checkpointed_policy_is_saved_and_acts_like_any_other(fabric, sampler, tmp_path):
    learners = [examples.learner(fabric, dataclasses.replace(examples.LEARNER, activation_checkpointing=flag))
                for flag in (False, True)]
    for learner, expected in zip(learners, (1, 2), strict=True):
        calls = []
        first = next(module for module in learner.policy.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        learner.update(sampler.sample(0))
        assert len(calls) == expected
    plain, twice = (learner.policy for learner in learners)
    assert list(plain.state_dict()) == list(twice.state_dict())
    twice.save(tmp_path / "policy")
    for name, value in TinyVLA.load(tmp_path / "policy").state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    learners[0].load_state_dict(learners[1].state_dict())
    learners[1].load_state_dict(learners[0].state_dict())


def test_too_few_windows_for_all_pieces_is_one_line():
    dataclasses.replace(examples.LEARNER, micro_batches=2).check_share(8, 4)
    with pytest.raises(UserError, match=r"type replay\.windows=12"):
        dataclasses.replace(examples.LEARNER, micro_batches=3).check_share(8, 4)
    with pytest.raises(UserError, match=r"learner\.micro_batches must be at least 1"):
        dataclasses.replace(examples.LEARNER, micro_batches=0)


def test_the_first_updates_move_only_the_critic(fabric, sampler):
    learner = examples.learner(fabric, dataclasses.replace(examples.LEARNER, value_warmup=1))
    before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
    learner.update(sampler.sample(0))
    moved = {name for name, value in learner.policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("value_") for name in moved)
    learner.update(sampler.sample(1))
    assert not torch.equal(learner.policy.action_head.weight, before["action_head.weight"])


def test_every_source_pulls_and_uncertain_imagination_pulls_less(fabric, sampler):
    batch = sampler.sample(0)
    shares = []
    for uncertainty in (0.0, 1.0):
        doubted = dataclasses.replace(batch, uncertainty=batch.uncertainty.gt(0) * uncertainty)
        shares.append(examples.learner(fabric).update(doubted))
    assert all(share[f"gradient_share/{source}"] > 0 for share in shares for source in Source)
    assert sum(shares[0][f"gradient_share/{source}"] for source in Source) == pytest.approx(1)
    assert shares[1]["gradient_share/imagined"] < 0.6 * shares[0]["gradient_share/imagined"]


def test_staleness_by_hand():
    # two tokens of lag 5 with coefficients 1 and .001 (sim), one token of lag 150 with 2 (imagined), one cloned (real)
    sums = staleness_sums(
        log_ratio=torch.tensor([[[0.0, -3.0]], [[0.7, 9.0]], [[0.1, 9.0]]]),
        coefficient=torch.tensor([[[1.0, 0.001]], [[2.0, 9.0]], [[1.0, 9.0]]]),
        gradient=torch.tensor([[[0.3, -0.1]], [[0.4, 0.0]], [[0.2, 0.0]]]), advantage=torch.ones(3, 1, 1),
        token_mask=torch.tensor([[True], [True], [True]]), policy_version=torch.tensor([195, 50, -1]),
        origin=torch.tensor([0, 2, 1]), version=200)
    metrics = staleness_metrics(sums)
    assert metrics["staleness/lag_0_20/tokens"] == 2
    assert metrics["staleness/lag_0_20/lag"] == 5
    assert metrics["staleness/lag_0_20/abs_log_ratio"] == 1.5
    assert metrics["staleness/lag_0_20/utilisation"] == 0.5
    # (1 + .001)^2 / (2 (1 + 1e-6))
    assert metrics["staleness/lag_0_20/effective_sample_share"] == pytest.approx(1.001**2 / (2 * (1 + 1e-6)))
    assert metrics["staleness/lag_0_20/suppressed"] == 0.5  # .001 < .1 exp(-3) = .005; 1 > .1
    assert metrics["staleness/lag_100_200/lag"] == 150
    # half of the tokens lie in the first bin, below 1e-4; 3 lies between two edges a factor 1.26 apart
    assert metrics["staleness/lag_0_20/abs_log_ratio_p50"] == pytest.approx(0, abs=1e-4)
    assert metrics["staleness/lag_0_20/abs_log_ratio_p95"] == pytest.approx(3, rel=0.26)
    # PPO would have used ratios 1 and .05 (A > 0): the second is below .1; GIPO .5 gives exp(-3 - 18) there
    assert metrics["counterfactual/ppo_0.2/lag_0_20/utilisation"] == 0.5
    assert metrics["counterfactual/gipo_0.5/lag_0_20/utilisation"] == 0.5
    assert "staleness/not_ours/tokens" in metrics
    assert metrics["staleness/not_ours/lag"] == 0
    assert metrics["gradient_share/sim"] == pytest.approx(0.4)
    assert set(BUCKETS) >= {name.split("/")[1] for name in metrics if "lag_" in name.split("/")[1]}
