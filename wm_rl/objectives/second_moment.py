"""Second-moment trust, after M2PO (arXiv 2510.01161): drop only the most extreme log-ratios of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from data.types import UserError
from wm_rl.objectives.base import like, ratio


@dataclass(frozen=True, kw_only=True)
class SecondMoment:
    """Plain importance sampling over the tokens that remain when the mean of ``(log r)²`` is held to ``limit``.

    Only tokens that the update would drive further from the behaviour are ever dropped (``A > 0, r > 1`` or ``A < 0,
    r < 1``, as in PPO), the most extreme first. The mean is over the tokens that one call sees, so several devices
    each hold it on their own share.
    """

    limit: float
    """Largest mean squared log-ratio of the candidates that are kept, in nat²; the paper uses 0.04."""

    def __post_init__(self) -> None:
        """Refuse a limit that is none."""
        if not self.limit > 0:
            raise UserError(f"objective.limit must be positive, got {self.limit}; try objective.limit=0.04")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``r``, or 0 where it was dropped."""
        x = log_ratio.detach().float()
        candidate = torch.where(advantage >= 0, x > 0, x < 0)
        squares = x[candidate].square().sort().values
        means = squares.cumsum(0) / torch.arange(1, len(squares) + 1, device=x.device)
        kept = int((means <= self.limit).sum())  # the running mean of sorted values never falls
        largest = squares[kept - 1] if kept else -1.0
        return like(torch.where(candidate & (x.square() > largest), 0.0, ratio(log_ratio)), log_ratio)

    def bound(self, width: float = 1.0) -> float:
        """None: what lies on the other side of 1 is never dropped."""
        return math.inf
