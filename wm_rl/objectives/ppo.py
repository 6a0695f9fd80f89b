"""PPO's clipped surrogate (arXiv 1707.06347, eq. 7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from data.types import UserError
from wm_rl.objectives.base import like, ratio


@dataclass(frozen=True, kw_only=True)
class PpoClip:
    """``J = E[min(r A, clip(r, 1−ε, 1+ε) A)]``."""

    epsilon: float

    def __post_init__(self) -> None:
        """Refuse a clip range that is none."""
        if not self.epsilon > 0:
            raise UserError(f"objective.epsilon must be positive, got {self.epsilon}; try objective.epsilon=0.2")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``r`` where the minimum is the unclipped term, else 0. The clip range is ``ε · width``."""
        r, epsilon = ratio(log_ratio), self.epsilon * width
        clipped = torch.where(advantage >= 0, r > 1 + epsilon, r < 1 - epsilon)
        return like(torch.where(clipped, 0.0, r), log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """None: where A < 0, ``r`` is not clipped from above."""
        return math.inf
