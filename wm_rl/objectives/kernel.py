"""GIPO (arXiv 2603.03955): importance sampling under a smooth trust weight in log-ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from data.types import UserError
from wm_rl.objectives.base import LOG_RATIO_LIMIT, like

KERNELS = ("gaussian", "laplacian", "cauchy")


@dataclass(frozen=True, kw_only=True)
class Gipo:
    """``J = E[w r A]`` with a detached weight ``w = K(log r / β)``, so the coefficient is ``c = w r``.

    | kernel | ``w`` | supremum of ``w r`` |
    |---|---|---|
    | gaussian | ``exp(−½ (log r / β)²)`` | ``exp(β²/2)``, at ``r = exp(β²)`` |
    | laplacian | ``exp(−abs(log r) / β)`` | 1 for β ≤ 1, else none |
    | cauchy | ``1 / (1 + (log r / β)²)`` | none |

    The weight must be detached: with the gradient through it, the update would change its sign above ``r = exp(β²)``.
    The exponents are added before ``exp``, so no log-ratio gives an infinity or a NaN; where there is no supremum, log
    r is cut at ``LOG_RATIO_LIMIT``.
    """

    beta: float
    """Width of the trust weight in log-ratio. The smaller, the closer to on-policy data a token must be to count."""
    beta_positive: float | None = None
    """β where the advantage is positive; null: ``beta``."""
    beta_negative: float | None = None
    """β where the advantage is negative; null: ``beta``."""
    kernel: str = "gaussian"
    one_sided: bool = False
    """Damp only what drives the policy further from the behaviour (``A > 0, r > 1`` or ``A < 0, r < 1``), as PPO clips
    only there; what brings it back counts ``min(r, cap)``."""
    cap: float = 10.0
    """Largest coefficient of what brings the policy back."""

    def __post_init__(self) -> None:
        """Refuse widths that are no widths."""
        for name in ("beta", "beta_positive", "beta_negative"):
            width = getattr(self, name)
            if width is not None and not width > 0:
                raise UserError(f"objective.{name} must be positive, got {width}; try objective.{name}=0.5")
        if not self.cap >= 1:
            raise UserError(f"objective.cap must be at least 1, got {self.cap}")
        if self.kernel not in KERNELS:
            raise UserError(f"objective.kernel: expected {', '.join(KERNELS)}, got {self.kernel!r}")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``exp(log r + log K(log r / (β · width)))``."""
        x = log_ratio.detach().float()
        beta = torch.where(advantage >= 0, self._beta(True), self._beta(False)) * width
        if self.kernel == "gaussian":
            exponent = x - 0.5 * (x / beta).square()
        elif self.kernel == "laplacian":
            exponent = (x - x.abs() / beta).clamp(max=LOG_RATIO_LIMIT)
        else:
            exponent = x.clamp(max=LOG_RATIO_LIMIT) - torch.log1p((x / beta).square())
        if self.one_sided:
            outwards = torch.where(advantage >= 0, x > 0, x < 0)
            exponent = torch.where(outwards, exponent, x.clamp(max=math.log(self.cap)))
        return like(torch.exp(exponent), log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """``exp(β²/2)`` for the Gaussian, of the larger β; of a one-sided one the cap, where that is larger."""
        beta = max(self._beta(True), self._beta(False)) * width
        outwards = math.inf
        if self.kernel == "gaussian" and beta**2 / 2 < 700:
            outwards = math.exp(beta**2 / 2)
        elif self.kernel == "laplacian" and beta <= 1:
            outwards = 1.0
        return max(outwards, self.cap) if self.one_sided else outwards

    def _beta(self, positive: bool) -> float:
        own = self.beta_positive if positive else self.beta_negative
        return self.beta if own is None else own
