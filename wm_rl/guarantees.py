"""What can be said of a surrogate beyond its value: docs/objective.md derives each line.

All are estimates from one batch, of advantages as the update scales them, under the largest ``|A|`` that was seen.
They are logged so that a drift shows; their size says little, and far from the behaviour they are vacuous.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wm_rl.objectives.base import ratio

CONFIDENCE = 0.95


def hoeffding_half_width(bound: float, largest_advantage: float, windows: int, confidence: float = CONFIDENCE) -> float:
    """Half the width of the interval that holds the expected surrogate with probability ``confidence``.

    A window's mean of ``c A`` lies in ``± bound · largest_advantage`` and windows are drawn independently (given the
    store), so ``M A_max √(2 ln(2/δ) / n)``. Infinite for an objective without a bound. Neither the tokens nor the
    decisions of one window are independent, so they do not count.
    """
    return bound * largest_advantage * math.sqrt(2 * math.log(2 / (1 - confidence)) / windows)


@dataclass(frozen=True, kw_only=True)
class PenaltySums:
    """Sums over decisions, to be added over ranks (``largest`` is a maximum)."""

    sums: Float[Tensor, " 5"]
    """Tokens, ``Σ c A``, ``Σ |r − c|``, decisions, ``Σ over decisions of Σ over tokens ½|r − 1|`` (cut at 1)."""
    largest: Float[Tensor, ""]
    """Largest ``|A|``."""


def penalty_sums(
    *, log_ratio: Float[Tensor, "n k a"], coefficient: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"],
    token_mask: Bool[Tensor, "n k"],
) -> PenaltySums:
    """Sums of one rank."""
    real = token_mask[:, :, None].expand_as(log_ratio).double()
    r, c = ratio(log_ratio).double(), coefficient.double()
    a = advantage.double()
    distance = (0.5 * (r - 1).abs() * real).sum(dim=(1, 2)).clamp(max=1)
    sums = torch.stack([real.sum(), (c * a * real).sum(), ((r - c).abs() * real).sum(),
                        torch.tensor(float(len(r)), dtype=torch.float64, device=r.device), distance.sum()])
    return PenaltySums(sums=sums, largest=a.abs().max() if len(a) else a.sum())


def guarantee_metrics(
    sums: Float[Tensor, " 5"], largest: float, *, bound: float, discount: float, windows: int
) -> dict[str, float]:
    """Surrogate, Hoeffding half-width, and the two penalties of the improvement bound.

    ``shift``: ``2 γ/(1−γ)² · A_max · E[TV(π, μ)]`` for the states being the behaviour's (arXiv 1705.10528, cor. 1; per
    decision, the total variation of a chunk at most the sum of its tokens'). ``bias``: ``A_max · E|r − c|`` for the
    coefficient not being the ratio. ``discount`` is the mean per decision.
    """
    tokens, surrogate, gap, decisions, distance = sums.tolist()
    metrics = {"guarantee/surrogate": surrogate / tokens,
               "guarantee/shift": 2 * discount / max(1 - discount, 1e-6) ** 2 * largest * distance / decisions,
               "guarantee/bias": largest * gap / tokens}
    if math.isfinite(bound):
        metrics["guarantee/hoeffding"] = hoeffding_half_width(bound, largest, windows)
    return metrics
