"""Soft adaptive policy optimisation (arXiv 2511.20347): a sigmoid gate on the ratio."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.types import UserError
from wm_rl.objectives.base import LOG_RATIO_LIMIT, like, ratio


@dataclass(frozen=True, kw_only=True)
class Sapo:
    """``J = E[(4/τ) σ(τ (r − 1)) A]``, τ by the sign of A."""

    tau_positive: float
    tau_negative: float

    def __post_init__(self) -> None:
        """Refuse a temperature that is none."""
        for name in ("tau_positive", "tau_negative"):
            if not getattr(self, name) > 0:
                raise UserError(f"objective.{name} must be positive, got {getattr(self, name)}; "
                                f"try objective.{name}=1.0")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``4 σ(z) σ(−z) r`` with ``z = τ (r − 1) / width``: 1 on policy, vanishing on both sides."""
        r = ratio(log_ratio)
        gate = torch.where(advantage >= 0, self.tau_positive, self.tau_negative) * (r - 1) / width
        return like(4 * torch.sigmoid(gate) * torch.sigmoid(-gate) * r, log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """Found numerically: the coefficient is smooth with one maximum."""
        r = np.exp(np.linspace(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, 200_001))
        gate = np.minimum(min(self.tau_positive, self.tau_negative) / width * (r - 1), 700)
        return float((4 * r * np.exp(-gate) / (1 + np.exp(-gate)) ** 2).max())
