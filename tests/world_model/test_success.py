import pytest
import torch

from world_model.success import SuccessModel, balanced_loss


def test_it_has_about_170k_parameters_besides_the_words():
    model = SuccessModel()
    assert 140_000 < sum(p.numel() for p in model.parameters()) - model.words.weight.numel() < 200_000


def test_the_prior_shifts_the_log_odds():
    model = SuccessModel().eval()
    frames, tokens = torch.randint(0, 256, (4, 2, 3, 32, 32), dtype=torch.uint8), torch.ones(4, 24, dtype=torch.long)
    given = frames, torch.rand(4, 2, 4), tokens
    with torch.no_grad():
        balanced = torch.sigmoid(model.balanced_logit(*given))
        model.prior.fill_(0.1)
        odds = balanced / (1 - balanced) * 0.1 / 0.9  # Bayes: prior odds times the likelihood ratio
        assert torch.allclose(model(*given), odds / (1 + odds), atol=1e-5)


def test_balanced_loss_by_hand():
    # 1 success with logit 0, three failures with logit 2: half of log 2, half of log(1 + e^2)
    loss = balanced_loss(torch.tensor([0.0, 2.0, 2.0, 2.0]), torch.tensor([True, False, False, False]))
    assert loss.item() == pytest.approx(0.5 * 0.693147 + 0.5 * 2.126928, abs=1e-5)


def test_any_number_of_cameras_and_sizes():
    model = SuccessModel(cameras=2)
    frames = torch.zeros(2, 2, 6, 96, 96, dtype=torch.uint8)
    assert model(frames, torch.zeros(2, 2, 4), torch.zeros(2, 24, dtype=torch.long)).shape == (2,)
