"""Objectives against numbers worked by hand and against autograd of the textbook surrogates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.types import Source, UserError
from wm_rl.objectives import Gipo, NoClip, PpoClip, Sapo, surrogate_loss

GIPO = Gipo(beta=0.5, beta_positive=None, beta_negative=None)
PPO = PpoClip(epsilon=0.2)
SAPO = Sapo(tau_positive=1.0, tau_negative=1.05)
NO_CLIP = NoClip()
ALL = [GIPO, PPO, SAPO, NO_CLIP]


def coefficient(objective, log_ratio, advantage, source=Source.SIM, dtype=torch.float32):
    x = torch.tensor(log_ratio, dtype=dtype).reshape(-1, 1, 1)
    a = torch.tensor(advantage, dtype=dtype).reshape(-1, 1, 1)
    return objective.coefficient(x, a, [source] * len(x)).flatten()


def test_gipo_by_hand():
    # beta 0.5, r = 2: log r = .6931, w = exp(-.5 (.69315/.5)^2) = exp(-.96091) = .38255; w r = .76509
    # r = 1/2: the same w, w r = .19127; r = 1: 1
    got = coefficient(GIPO, [math.log(2), -math.log(2), 0.0], [1.0, 1.0, -1.0])
    assert got.tolist() == pytest.approx([0.76509, 0.19127, 1.0], abs=1e-5)


def test_gipo_width_by_sign_and_source():
    objective = Gipo(beta=1.0, beta_positive=2.0, beta_negative=0.5, beta_source={"imagined": 0.5})
    # log r = 1: exp(1 - 1/(2 * 4)) = exp(.875) = 2.39888 for A > 0; exp(1 - 1/(2 * .25)) = exp(-1) = .36788 for A < 0
    assert coefficient(objective, [1.0, 1.0], [1.0, -1.0]).tolist() == pytest.approx([2.39888, 0.36788], abs=1e-5)
    # imagined halves the widths: exp(1 - 1/2) = 1.64872 and exp(1 - 8) = .00091
    imagined = coefficient(objective, [1.0, 1.0], [1.0, -1.0], Source.IMAGINED)
    assert imagined.tolist() == pytest.approx([1.64872, 0.00091], abs=1e-5)


def test_the_others_by_hand():
    # PPO, eps .2: r = 1.3 is clipped for A > 0 only, r = .7 for A < 0 only
    x = [math.log(1.3), math.log(1.3), math.log(0.7), math.log(0.7)]
    assert coefficient(PPO, x, [1.0, -1.0, 1.0, -1.0]).tolist() == pytest.approx([0, 1.3, 0.7, 0], abs=1e-6)
    # SAPO, tau 1, r = 2: sigma(1) = .731059, 4 * .731059 * .268941 * 2 = 1.57290
    assert coefficient(SAPO, [math.log(2)], [1.0]).tolist() == pytest.approx([1.57290], abs=1e-4)
    assert coefficient(NO_CLIP, [math.log(3)], [1.0]).tolist() == pytest.approx([3.0], abs=1e-5)


SURROGATES = {  # written from the papers, with autograd through everything that is not a stop-gradient
    "gipo": (GIPO, lambda x, a: torch.exp(-0.5 * (x.detach() / 0.5) ** 2) * x.exp() * a),
    "ppo": (PPO, lambda x, a: torch.minimum(x.exp() * a, x.exp().clamp(0.8, 1.2) * a)),
    "sapo": (SAPO, lambda x, a: 4 / torch.where(a >= 0, 1.0, 1.05)
             * torch.sigmoid(torch.where(a >= 0, 1.0, 1.05) * (x.exp() - 1)) * a),
    "no_clip": (NO_CLIP, lambda x, a: x.exp() * a),
}


@pytest.mark.parametrize("name", SURROGATES)
@given(log_ratio=st.lists(st.floats(-4, 4), min_size=1, max_size=5), data=st.data())
def test_gradient_is_the_surrogates(name, log_ratio, data):
    objective, surrogate = SURROGATES[name]
    advantage = data.draw(st.lists(st.floats(-3, 3), min_size=len(log_ratio), max_size=len(log_ratio)))
    behaviour = torch.zeros(len(log_ratio), 1, 1, dtype=torch.float64)
    a = torch.tensor(advantage, dtype=torch.float64).reshape(-1, 1, 1)
    log_prob = torch.tensor(log_ratio, dtype=torch.float64).reshape(-1, 1, 1).requires_grad_()
    expected = torch.autograd.grad(-surrogate(log_prob - behaviour, a).sum(), log_prob)[0]
    c = objective.coefficient(log_prob - behaviour, a, [Source.SIM] * len(log_ratio))
    loss = surrogate_loss(log_prob, c, a, torch.ones_like(a))
    got = torch.autograd.grad(loss, log_prob)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gipo_gradient_by_finite_differences():
    # with the weight frozen at x0, (J(x0 + h) - J(x0 - h)) / 2h of w(x0) e^x A
    x0, a, h = 0.4, 1.7, 1e-5
    w = math.exp(-0.5 * (x0 / 0.5) ** 2)
    slope = (w * math.exp(x0 + h) * a - w * math.exp(x0 - h) * a) / (2 * h)
    got = coefficient(GIPO, [x0], [a], dtype=torch.float64).item() * a
    assert got == pytest.approx(slope, rel=1e-6)


@given(log_ratio=st.floats(-200, 200), beta=st.floats(0.05, 3))
def test_gipo_is_bounded_by_exp_half_beta_squared(log_ratio, beta):
    objective = Gipo(beta=beta, beta_positive=None, beta_negative=None)
    got = coefficient(objective, [log_ratio], [1.0], dtype=torch.float64).item()
    assert 0 <= got <= math.exp(beta**2 / 2) * (1 + 1e-5)


def test_gipo_reaches_its_bound_at_exp_beta_squared():
    got = coefficient(Gipo(beta=1.5, beta_positive=None, beta_negative=None), [1.5**2], [1.0])
    assert got.item() == pytest.approx(math.exp(1.5**2 / 2), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ALL, ids=lambda o: type(o).__name__)
def test_extreme_log_ratios_are_finite(objective, dtype):
    log_prob = torch.tensor([100.0, -100.0, 12.0, 0.0], dtype=dtype).reshape(-1, 1, 1).requires_grad_()
    for sign in (1.0, -1.0):
        a = torch.full_like(log_prob, sign).detach()
        c = objective.coefficient(log_prob, a, [Source.SIM] * 4)
        loss = surrogate_loss(log_prob, c, a, torch.ones_like(a))
        gradient = torch.autograd.grad(loss, log_prob)[0]
        assert torch.isfinite(c).all()
        assert torch.isfinite(gradient).all()
        assert c.flatten()[3] == 1


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"objective\.beta must be positive, got 0"):
        Gipo(beta=0.0, beta_positive=None, beta_negative=None)
    with pytest.raises(UserError, match=r"names 'dreams'"):
        Gipo(beta=1.0, beta_positive=None, beta_negative=None, beta_source={"dreams": 1.0})
