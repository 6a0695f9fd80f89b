"""Importance sampling with nothing, or a cap, on the ratio."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from data.types import UserError
from wm_rl.objectives.base import like, ratio


@dataclass(frozen=True, kw_only=True)
class NoClip:
    """Plain importance sampling ``J = E[r A]``: unbiased, of unbounded variance."""

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """The ratio itself."""
        return like(ratio(log_ratio), log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """None."""
        return math.inf


@dataclass(frozen=True, kw_only=True)
class TruncatedIs:
    """Truncated importance sampling, ``c = min(r, cap)`` (V-trace's ρ̄, arXiv 1802.01561, eq. 1)."""

    cap: float

    def __post_init__(self) -> None:
        """Refuse a cap that lets nothing through."""
        if not self.cap > 0:
            raise UserError(f"objective.cap must be positive, got {self.cap}; try objective.cap=1.0")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``min(r, cap)``; the sign of the advantage does not matter."""
        return like(ratio(log_ratio).clamp(max=self.cap), log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """The cap."""
        return self.cap
