"""Figures of token probabilities, by hand and by laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wm_rl.calibration import (
    effective_sample_share,
    expected_calibration_error,
    fit_temperature,
    marginal_log_prob,
    token_log_prob,
)


def test_the_error_by_hand():
    # Two tokens at confidence 0.9, one of them right: |0.5 - 0.9|. Two at 0.6, both right: |1 - 0.6|.
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]], dtype=torch.float64)
    token = torch.tensor([0, 1, 1, 1])
    assert expected_calibration_error(probabilities.log(), token) == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    # Within one bin what is too sure and what is not sure enough cancel, as the definition says.
    both = torch.tensor([[0.61, 0.39], [0.65, 0.35]], dtype=torch.float64)
    assert expected_calibration_error(both.log(), torch.tensor([0, 1])) == pytest.approx(abs(0.5 - 0.63))


def test_a_temperature_by_hand():
    # Three of four tokens are bin 0. At logit z the best 1 / T has sigmoid(z / T) = 3 / 4, so T = z / log 3.
    logits = torch.tensor([[4.0, 0.0]]).repeat(4, 1)
    assert fit_temperature(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(4 / math.log(3), rel=1e-3)


def test_a_marginal_by_hand():
    seen, of = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    # Class 0: counts 2 1 0, plus one each: 3/6 2/6 1/6. Class 1: 0 0 1 -> 1/4 1/4 2/4.
    found = marginal_log_prob(seen, of, torch.tensor([0, 1, 2, 0, 2]), torch.tensor([0, 0, 0, 1, 1]), bins=3)
    np.testing.assert_allclose(found.exp(), [1 / 2, 1 / 3, 1 / 6, 1 / 4, 1 / 2], rtol=1e-6)


def test_an_effective_sample_by_hand():
    assert effective_sample_share(torch.tensor([0.3, 0.3, 0.3])) == pytest.approx(1)
    assert effective_sample_share(torch.tensor([1.0, 1.0, 4.0]).log()) == pytest.approx(36 / (3 * 18))
    assert effective_sample_share(torch.tensor([0.0, -800.0, -800.0, 800.0])) == pytest.approx(0.25)  # no overflow


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.3, 4.0))
def test_the_temperature_is_the_best_one_and_scales_with_the_logits(seed, factor):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, 5, generator=draw) * 2
    token = torch.distributions.Categorical(logits=logits / 1.7).sample()
    token[:10] = torch.arange(10) % 5  # so that no finite temperature is beaten by another of the search's ends
    best = fit_temperature(logits, token)

    def likelihood(temperature):
        return token_log_prob(logits.double() / temperature, token).mean()

    assert all(likelihood(best) >= likelihood(other) - 1e-6 for other in np.geomspace(0.05, 20, 60))
    if 0.05 < best * factor < 20 and 0.06 < best < 19:
        assert fit_temperature(logits * factor, token) == pytest.approx(best * factor, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.floats(-5, 5))
def test_an_effective_sample_lies_between_one_and_all_whatever_the_scale(log_ratios, shift):
    share = effective_sample_share(torch.tensor(log_ratios, dtype=torch.float64))
    ratios = np.exp(np.array(log_ratios))
    assert share == pytest.approx(ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()), rel=1e-6)
    assert 1 / len(log_ratios) - 1e-9 <= share <= 1 + 1e-9
    shifted = effective_sample_share(torch.tensor(log_ratios, dtype=torch.float64) + shift)
    assert shifted == pytest.approx(share, rel=1e-6)
