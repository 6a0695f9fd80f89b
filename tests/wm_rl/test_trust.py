"""Widths by source, their adaptation, and the guarantees."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric

from data.sampler import DecisionSampler
from data.types import Source, UserError
from tests import examples
from wm_rl.guarantees import guarantee_metrics, hoeffding_half_width, penalty_sums
from wm_rl.objectives import Gipo
from wm_rl.staleness import BUCKETS
from wm_rl.trust import GROUPS, Trust, TrustConfig, groups

GIPO = Gipo(beta=1.0)


def observe(trust, log_ratio, group=None):
    n = len(log_ratio)
    trust.observe(GIPO, log_ratio=log_ratio.reshape(n, 1, 1), advantage=torch.ones(n, 1, 1),
                  token_mask=torch.ones(n, 1, dtype=torch.bool),
                  group=torch.zeros(n, dtype=torch.int64) if group is None else group, total=lambda x: x)


def share(log_ratio, width):
    c = GIPO.coefficient(log_ratio.reshape(-1, 1, 1), torch.ones(len(log_ratio), 1, 1),
                         torch.full((len(log_ratio), 1, 1), width)).double()
    return float(c.sum() ** 2 / (len(log_ratio) * c.square().sum()))


def test_width_is_the_factor_of_the_source_in_every_bucket():
    trust = Trust(TrustConfig(width_source={"imagined": 0.5}))
    origin = torch.tensor([0, 2, 2])
    group = groups(origin, torch.tensor([0, 0, len(BUCKETS) - 1]))
    assert trust.width(group).flatten().tolist() == pytest.approx([1, 0.5, 0.5])
    assert len(trust.log_width) == GROUPS == len(Source) * len(BUCKETS)


def test_adaptation_settles_at_the_widest_that_keeps_the_share():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 1.2
    trust = Trust(TrustConfig(effective_share=0.5))
    for _ in range(300):
        observe(trust, x)
    width = float(trust.log_width[0].exp())
    assert share(x, width) >= 0.5 - 0.02
    assert share(x, width * 2 ** 0.25) < 0.5  # the next wider candidate does not
    assert trust.log_width[1:].abs().max() == 0  # groups without data stay


def test_adaptation_moves_groups_apart():
    fresh, stale = torch.randn(500) * 0.05, torch.randn(500) * 3
    trust = Trust(TrustConfig(effective_share=0.6))
    group = torch.tensor([0] * 500 + [3] * 500)
    for _ in range(200):
        observe(trust, torch.cat([fresh, stale]), group)
    assert trust.log_width[0] > 1.5  # everything may count
    assert trust.log_width[3] < trust.log_width[0]


def test_trust_survives_a_resume(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DecisionSampler(examples.store(tmp_path / "replay.zarr"), examples.REPLAY, chunk=2, seed=3)
    trust = dataclasses.replace(examples.TRUST, effective_share=0.9, scale_learning_rate=True)
    whole, first, second = (examples.learner(fabric, trust=trust) for _ in range(3))
    for step in range(4):
        metrics = whole.update(sampler.sample(step))
    for step in range(2):
        first.update(sampler.sample(step))
    second.load_state_dict(first.state_dict())
    for step in range(2, 4):
        second.update(sampler.sample(step))
    assert torch.equal(second.trust.log_width, whole.trust.log_width)
    assert not torch.equal(whole.trust.log_width, torch.zeros(GROUPS))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], value), name
    assert any(name.startswith("trust/sim/") for name in metrics)


def test_the_learning_rate_follows_the_effective_share(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DecisionSampler(examples.store(tmp_path / "replay.zarr"), examples.REPLAY, chunk=2, seed=3)
    learner = examples.learner(fabric, trust=dataclasses.replace(examples.TRUST, scale_learning_rate=True))
    metrics = learner.update(sampler.sample(0))
    shares = [metrics[f"staleness/{source}/effective_sample_share"] for source in Source]
    rates = [group["lr"] for group in learner.optimizer.param_groups]
    assert rates[0] == rates[1] < examples.LEARNER.learning_rate
    assert min(shares) - 0.1 < rates[0] / examples.LEARNER.learning_rate < max(shares) + 0.1
    assert rates[2] == examples.LEARNER.value_learning_rate


def test_joint_ratio_is_the_sum_over_real_tokens(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DecisionSampler(examples.store(tmp_path / "replay.zarr"), examples.REPLAY, chunk=2, seed=3)
    joint = examples.learner(fabric, dataclasses.replace(examples.LEARNER, ratio="joint")).update(sampler.sample(0))
    token = examples.learner(fabric).update(sampler.sample(0))
    # a sum of several independent log-ratios is larger than their mean size
    assert joint["staleness/sim/abs_log_ratio"] > token["staleness/sim/abs_log_ratio"]
    assert joint["staleness/sim/utilisation"] <= token["staleness/sim/utilisation"]


def test_hoeffding_by_hand():
    # M = e^.5 = 1.64872, |A| <= 2, 8 windows, delta .05: 1.64872 * 2 * sqrt(2 * 3.68888 / 8) = 3.16659
    assert hoeffding_half_width(math.exp(0.5), 2.0, 8) == pytest.approx(3.1666, abs=1e-3)


def test_hoeffding_covers():
    generator = torch.Generator().manual_seed(0)
    half = hoeffding_half_width(1.0, 1.0, 20)
    means = (torch.rand(500, 20, generator=generator) * 2 - 1).mean(dim=1)
    assert (means.abs() <= half).double().mean() >= 0.95


def test_penalties_by_hand():
    # one decision of two tokens: r = 2 and 1, c = 1.5 and 1, A = -2; gamma .5
    x = torch.tensor([[[math.log(2), 0.0]]])
    sums = penalty_sums(log_ratio=x, coefficient=torch.tensor([[[1.5, 1.0]]]), advantage=torch.tensor([[[-2.0]]]),
                        token_mask=torch.ones(1, 1, dtype=torch.bool))
    got = guarantee_metrics(sums.sums, float(sums.largest), bound=math.inf, discount=0.5, windows=1)
    assert got["guarantee/surrogate"] == pytest.approx((1.5 + 1) * -2 / 2)
    assert got["guarantee/bias"] == pytest.approx(2 * 0.5 / 2)
    assert got["guarantee/shift"] == pytest.approx(2 * 0.5 / 0.25 * 2 * 0.5)  # total variation .5 |2 - 1| = .5
    assert "guarantee/hoeffding" not in got


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=30))
def test_the_bias_penalty_bounds_the_bias(log_ratios):
    x = torch.tensor(log_ratios, dtype=torch.float64).reshape(-1, 1, 1)
    a = torch.sin(torch.arange(len(x), dtype=torch.float64) * 7).reshape(-1, 1, 1)
    c = GIPO.coefficient(x, a, torch.ones_like(a))
    sums = penalty_sums(log_ratio=x, coefficient=c, advantage=a, token_mask=torch.ones(len(x), 1, dtype=torch.bool))
    got = guarantee_metrics(sums.sums, float(sums.largest), bound=GIPO.bound(), discount=0.9, windows=1)
    difference = ((x.exp() - c) * a).mean().abs()
    assert got["guarantee/bias"] >= difference - 1e-5


def test_bad_trust_is_refused():
    with pytest.raises(UserError, match=r"trust\.width_source names 'dreams'; sources are sim, real, imagined"):
        TrustConfig(width_source={"dreams": 1.0})
    with pytest.raises(UserError, match=r"trust\.effective_share must lie in \(0, 1\] or be null, got 2"):
        TrustConfig(effective_share=2)
