"""How good the token probabilities of a policy are, on tokens that it has not seen.

Axes: ``n``, ``m`` tokens (one action dimension at one control step), ``v`` bins.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

TEMPERATURES = (0.05, 20.0)
CONFIDENCE_BINS = 15
"""As Guo et al. (arXiv 1706.04599) use."""


def token_log_prob(logits: Float[Tensor, "n v"], token: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Log-prob of each token, nat."""
    return logits.log_softmax(dim=-1).gather(-1, token[:, None])[:, 0]


def fit_temperature(logits: Float[Tensor, "n v"], token: Int[Tensor, " n"]) -> float:
    """The ``T`` for which ``softmax(logits / T)`` gives the tokens the largest likelihood (Guo et al. 2017, section 4).

    The likelihood is concave in ``1 / T``, so the one maximum is found; it is looked for within ``TEMPERATURES``.
    """
    precise = logits.double()

    def loss(log_temperature: float) -> float:
        return -token_log_prob(precise / math.exp(log_temperature), token).mean().item()

    low, high = map(math.log, TEMPERATURES)
    return math.exp(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4}).x)


def expected_calibration_error(logits: Float[Tensor, "n v"], token: Int[Tensor, " n"]) -> float:
    """How far the largest probability is from how often it is right: ECE over equal bins of confidence.

    Guo et al. 2017, eq. 3: the mean over bins of |accuracy - confidence|, weighed by the tokens in each.
    """
    confidence, best = logits.softmax(dim=-1).max(dim=-1)
    gap = (best == token).double() - confidence.double()
    place = (confidence * CONFIDENCE_BINS).long().clamp(max=CONFIDENCE_BINS - 1)
    sums = torch.zeros(CONFIDENCE_BINS, dtype=torch.float64, device=gap.device).index_add(0, place, gap)
    return (sums.abs().sum() / len(token)).item()


def marginal_log_prob(
    seen: Int[Tensor, " m"], seen_class: Int[Tensor, " m"], token: Int[Tensor, " n"], token_class: Int[Tensor, " n"],
    *, bins: int,
) -> Float[Tensor, " n"]:
    """Log-prob of tokens by how often each bin was ``seen`` in their class (one is added to every count), nat."""
    classes = int(torch.cat([seen_class, token_class]).max()) + 1
    counts = torch.ones(classes * bins, dtype=torch.float64, device=token.device)
    counts = counts.index_add(0, seen_class * bins + seen, counts.new_ones(len(seen))).view(classes, bins)
    return (counts / counts.sum(dim=-1, keepdim=True)).log()[token_class, token].float()


def effective_sample_share(log_ratio: Float[Tensor, " n"]) -> float:
    """Kish's effective sample size of the importance weights ``exp(log_ratio)``, over their number: 1 when all agree.

    ``(sum r)^2 / (n sum r^2)``, in log space.
    """
    log_ratio = log_ratio.double()
    return (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp().item() / len(log_ratio)
