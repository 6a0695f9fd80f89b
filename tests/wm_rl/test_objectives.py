"""Objectives against numbers worked by hand and against autograd of the textbook surrogates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.types import UserError
from wm_rl.objectives import Gipo, NoClip, PpoClip, Sapo, SecondMoment, TruncatedIs, surrogate_loss

GIPO = Gipo(beta=0.5)
LAPLACIAN, CAUCHY = Gipo(beta=0.5, kernel="laplacian"), Gipo(beta=0.5, kernel="cauchy")
PPO = PpoClip(epsilon=0.2)
SAPO = Sapo(tau_positive=1.0, tau_negative=1.05)
NO_CLIP = NoClip()
ONE_SIDED = Gipo(beta=0.5, one_sided=True, cap=2.0)
TRUNCATED = TruncatedIs(cap=1.0)
ALL = [GIPO, ONE_SIDED, LAPLACIAN, CAUCHY, PPO, SAPO, NO_CLIP, TRUNCATED, SecondMoment(limit=0.04)]


def coefficient(objective, log_ratio, advantage, width=1.0, dtype=torch.float32):
    x = torch.tensor(log_ratio, dtype=dtype).reshape(-1, 1, 1)
    a = torch.tensor(advantage, dtype=dtype).reshape(-1, 1, 1)
    return objective.coefficient(x, a, torch.full_like(a, width)).flatten()


def test_gipo_by_hand():
    # beta 0.5, r = 2: log r = .6931, w = exp(-.5 (.69315/.5)^2) = exp(-.96091) = .38255; w r = .76509
    # r = 1/2: the same w, w r = .19127; r = 1: 1
    got = coefficient(GIPO, [math.log(2), -math.log(2), 0.0], [1.0, 1.0, -1.0])
    assert got.tolist() == pytest.approx([0.76509, 0.19127, 1.0], abs=1e-5)


def test_gipo_width_by_sign_and_by_factor():
    objective = Gipo(beta=1.0, beta_positive=2.0, beta_negative=0.5)
    # log r = 1: exp(1 - 1/(2 * 4)) = exp(.875) = 2.39888 for A > 0; exp(1 - 1/(2 * .25)) = exp(-1) = .36788 for A < 0
    assert coefficient(objective, [1.0, 1.0], [1.0, -1.0]).tolist() == pytest.approx([2.39888, 0.36788], abs=1e-5)
    # half the widths: exp(1 - 1/2) = 1.64872 and exp(1 - 8) = .00091
    half = coefficient(objective, [1.0, 1.0], [1.0, -1.0], 0.5)
    assert half.tolist() == pytest.approx([1.64872, 0.00091], abs=1e-5)


def test_other_kernels_by_hand():
    # beta .5, log r = .5: laplacian exp(.5 - 1) = .60653, cauchy e^.5 / 2 = .82436; log r = -.5: exp(-1.5), e^-.5 / 2
    assert coefficient(LAPLACIAN, [0.5, -0.5], [1.0, 1.0]).tolist() == pytest.approx([0.60653, 0.22313], abs=1e-5)
    assert coefficient(CAUCHY, [0.5, -0.5], [1.0, 1.0]).tolist() == pytest.approx([0.82436, 0.30327], abs=1e-5)


def test_the_others_by_hand():
    # PPO, eps .2: r = 1.3 is clipped for A > 0 only, r = .7 for A < 0 only
    x = [math.log(1.3), math.log(1.3), math.log(0.7), math.log(0.7)]
    assert coefficient(PPO, x, [1.0, -1.0, 1.0, -1.0]).tolist() == pytest.approx([0, 1.3, 0.7, 0], abs=1e-6)
    # SAPO, tau 1, r = 2: sigma(1) = .731059, 4 * .731059 * .268941 * 2 = 1.57290
    assert coefficient(SAPO, [math.log(2)], [1.0]).tolist() == pytest.approx([1.57290], abs=1e-4)
    assert coefficient(NO_CLIP, [math.log(3)], [1.0]).tolist() == pytest.approx([3.0], abs=1e-5)
    assert coefficient(TRUNCATED, [math.log(3), math.log(0.3)], [1.0, -1.0]).tolist() == pytest.approx([1, 0.3])
    # PPO at half the width, eps .1: r = 1.15 is clipped
    assert coefficient(PPO, [math.log(1.15)], [1.0], 0.5).tolist() == [0]


def test_one_sided_by_hand():
    # damped as GIPO is: A > 0 and r = 2 (.76509), A < 0 and r = 1/2 (.19127); let back: min(r, 2)
    x = [math.log(2), -math.log(2), -math.log(2), math.log(1.5), math.log(8)]
    got = coefficient(ONE_SIDED, x, [1.0, -1.0, 1.0, -1.0, -1.0])
    assert got.tolist() == pytest.approx([0.76509, 0.19127, 0.5, 1.5, 2.0], abs=1e-5)
    assert ONE_SIDED.bound() == 2
    assert Gipo(beta=3.0, one_sided=True, cap=2.0).bound() == pytest.approx(math.exp(4.5))
    assert Gipo(beta=1000.0).bound() == math.inf


def test_second_moment_by_hand():
    # candidates (driven outwards): .1, .2, .3, -.5 (A < 0); squares .01, .04, .09, .25, their running means .01,
    # .025, .0467, .0975: with a limit of .04 the first two stay. -.4 with A > 0 comes back by itself and stays.
    x, a = [0.1, 0.2, 0.3, -0.5, -0.4], [1.0, 1.0, 1.0, -1.0, 1.0]
    expected = [math.exp(0.1), math.exp(0.2), 0, 0, math.exp(-0.4)]
    assert coefficient(SecondMoment(limit=0.04), x, a).tolist() == pytest.approx(expected, abs=1e-6)
    assert coefficient(SecondMoment(limit=1e-9), x, a).tolist() == pytest.approx([0, 0, 0, 0, expected[4]], abs=1e-6)


SURROGATES = {  # written from the papers, with autograd through everything that is not a stop-gradient
    "gipo": (GIPO, lambda x, a: torch.exp(-0.5 * (x.detach() / 0.5) ** 2) * x.exp() * a),
    "ppo": (PPO, lambda x, a: torch.minimum(x.exp() * a, x.exp().clamp(0.8, 1.2) * a)),
    "sapo": (SAPO, lambda x, a: 4 / torch.where(a >= 0, 1.0, 1.05)
             * torch.sigmoid(torch.where(a >= 0, 1.0, 1.05) * (x.exp() - 1)) * a),
    "one_sided": (ONE_SIDED, lambda x, a: torch.where(
        a * x > 0, torch.exp(-0.5 * (x.detach() / 0.5) ** 2) * x.exp(), x.exp().clamp(max=2).detach() * x) * a),
    "no_clip": (NO_CLIP, lambda x, a: x.exp() * a),
    "laplacian": (LAPLACIAN, lambda x, a: torch.exp(-x.detach().abs() / 0.5) * x.exp() * a),
    "cauchy": (CAUCHY, lambda x, a: x.exp() * a / (1 + (x.detach() / 0.5) ** 2)),
    "truncated_is": (TRUNCATED, lambda x, a: x.exp().clamp(max=1).detach() * x * a),
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
    c = objective.coefficient(log_prob - behaviour, a, torch.ones_like(a))
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
    objective = Gipo(beta=beta)
    got = coefficient(objective, [log_ratio], [1.0], dtype=torch.float64).item()
    assert 0 <= got <= math.exp(beta**2 / 2) * (1 + 1e-5)


def test_gipo_reaches_its_bound_at_exp_beta_squared():
    got = coefficient(Gipo(beta=1.5), [1.5**2], [1.0])
    assert got.item() == pytest.approx(math.exp(1.5**2 / 2), rel=1e-5)


@given(log_ratio=st.floats(-200, 200), advantage=st.sampled_from([-1.0, 1.0]), width=st.floats(0.1, 3))
@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_no_coefficient_exceeds_the_bound(objective, log_ratio, advantage, width):
    got = coefficient(objective, [log_ratio], [advantage], width).item()
    assert 0 <= got <= objective.bound(width) * (1 + 1e-5)


def test_bounds_are_reached():
    for objective, log_ratio in ((Gipo(beta=0.8), 0.64), (Gipo(beta=0.8, beta_negative=1.2), 1.44), (LAPLACIAN, 0.0),
                                 (TRUNCATED, 3.0)):
        largest = max(coefficient(objective, [log_ratio], [sign]).item() for sign in (1.0, -1.0))
        assert largest == pytest.approx(objective.bound(), rel=1e-5)
    ratios = torch.linspace(-5, 5, 20_001).tolist()
    assert coefficient(SAPO, ratios, [1.0] * len(ratios)).max().item() == pytest.approx(SAPO.bound(), rel=1e-4)
    assert PPO.bound() == NO_CLIP.bound() == CAUCHY.bound() == Gipo(beta=2.0, kernel="laplacian").bound() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", ALL, ids=repr)
def test_extreme_log_ratios_are_finite(objective, dtype):
    log_prob = torch.tensor([100.0, -100.0, 12.0, 0.0], dtype=dtype).reshape(-1, 1, 1).requires_grad_()
    for sign in (1.0, -1.0):
        a = torch.full_like(log_prob, sign).detach()
        c = objective.coefficient(log_prob, a, torch.ones_like(a))
        loss = surrogate_loss(log_prob, c / 1e4, a, torch.ones_like(a))
        gradient = torch.autograd.grad(loss, log_prob)[0]
        assert torch.isfinite(c).all()
        assert torch.isfinite(gradient).all()
        assert c.flatten()[3] == 1


def test_bad_settings_are_refused():
    with pytest.raises(UserError, match=r"objective\.beta must be positive, got 0"):
        Gipo(beta=0.0)
    with pytest.raises(UserError, match=r"objective\.kernel: expected gaussian, laplacian, cauchy, got 'box'"):
        Gipo(beta=1.0, kernel="box")
    for wrong in (lambda: PpoClip(epsilon=0), lambda: TruncatedIs(cap=0), lambda: SecondMoment(limit=0),
                  lambda: Sapo(tau_positive=0, tau_negative=1)):
        with pytest.raises(UserError, match="must be positive"):
            wrong()
