"""Generalised advantage estimation over decisions (arXiv 1506.02438, eqs. 11-16), for chunks of unequal length.

A decision lasts as many control steps as its chunk ran, so the discount differs per column (a semi-Markov process):
``δ_i = R_i + γ_i V_{i+1} − V_i`` and ``A_i = δ_i + γ_i λ A_{i+1}``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    *,
    reward: Float[Tensor, "b d"],
    value: Float[Tensor, "b d"],
    final_value: Float[Tensor, " b"],
    discount: Float[Tensor, "b d"],
    mask: Bool[Tensor, "b d"],
    terminated: Bool[Tensor, " b"],
    trace: float,
) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
    """Advantages and value targets (``advantage + value``); both 0 where ``mask`` is false.

    Args:
        reward: discounted sum inside each chunk.
        value: critic at each decision, under its *current* parameters.
        final_value: critic at the observation after the last real decision.
        discount: γ to the power of the control steps that the decision lasted.
        mask: real columns, which come first in every row.
        terminated: no value follows the last real decision.
        trace: λ, per decision.
    """
    following = final_value * ~terminated
    running = torch.zeros_like(following)
    advantages = torch.zeros_like(value)
    for column in reversed(range(value.shape[1])):
        real = mask[:, column]
        delta = reward[:, column] + discount[:, column] * following - value[:, column]
        running = torch.where(real, delta + discount[:, column] * trace * running, running)
        following = torch.where(real, value[:, column], following)
        advantages[:, column] = torch.where(real, running, 0.0)
    return advantages, (advantages + value) * mask
