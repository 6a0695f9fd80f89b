"""Widths and weights by source, joint ratios, and the guarantees."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric import Fabric

from data.sampler import DecisionSampler
from data.types import UserError
from tests import examples
from wm_rl.guarantees import guarantee_metrics, hoeffding_half_width, penalty_sums
from wm_rl.objectives import Gipo
from wm_rl.trust import Trust

GIPO = Gipo(beta=1.0)


def test_width_is_the_factor_of_the_source():
    trust = Trust(width_source={"imagined": 0.5})
    assert trust.width(torch.tensor([0, 2, 1, 2])).flatten().tolist() == pytest.approx([1, 0.5, 1, 0.5])
    assert trust.weight(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([1, math.exp(-1)])


def test_a_narrower_source_is_used_less(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    sampler = DecisionSampler(examples.store(tmp_path / "replay.zarr"), examples.REPLAY, chunk=2, seed=3)
    narrow = dataclasses.replace(examples.TRUST, width_source={"imagined": 0.2})
    plain = examples.learner(fabric).update(sampler.sample(0))
    less = examples.learner(fabric, trust=narrow).update(sampler.sample(0))
    assert less["gradient_share/imagined"] < 0.8 * plain["gradient_share/imagined"]
    assert less["staleness/sim/utilisation"] == plain["staleness/sim/utilisation"]


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
        Trust(width_source={"dreams": 1.0})
    with pytest.raises(UserError, match=r"trust\.imagined_temperature must be positive, got 0"):
        Trust(imagined_temperature=0)
