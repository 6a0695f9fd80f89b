"""What an objective is, and the one loss that turns any of them into a gradient."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Objectives without a trust weight of their own bound log r here: exp(20) = 4.9e8 is finite in fp32 and bf16."""

SMALL_FLOAT_LIMIT = 65504.0
"""Largest fp16 number: coefficients are cut here when they are returned in fp16."""


@runtime_checkable
class Objective(Protocol):
    """A surrogate, known by its gradient coefficient. Pure: nothing is remembered between calls.

    Axes: ``n`` valid decisions, ``k`` actions in a chunk, ``a`` action dimensions.
    """

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], width: Float[Tensor, "n 1 1"]
    ) -> Float[Tensor, "n k a"]:
        """``c`` such that the surrogate's gradient is ``E[c · A · ∇ log π]``; detached, in ``log_ratio``'s dtype.

        ``width`` multiplies the objective's own trust width, 1 for the nominal one; an objective without one ignores
        it.
        """
        ...

    def bound(self, width: float = 1.0) -> float:
        """Supremum of ``c`` over every log-ratio and every width up to this one; infinite where there is none."""
        ...


def surrogate_loss(
    log_prob: Float[Tensor, "n k a"],
    coefficient: Float[Tensor, "n k a"],
    advantage: Float[Tensor, "n 1 1"],
    weight: Float[Tensor, "n k a"],
) -> Float[Tensor, ""]:
    """Scalar whose gradient is ``−Σ weight · c · A · ∇ log π``. ``weight`` holds mask, trust and the normaliser.

    Its value means nothing (only its gradient is the surrogate's), which is why no log shows it.
    """
    return -(weight * coefficient.detach() * advantage.detach() * log_prob).sum()


def ratio(log_ratio: Tensor) -> Float[Tensor, "n k a"]:
    """``r`` in fp32, of a log-ratio that is bounded so that it is finite."""
    return log_ratio.detach().float().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def like(coefficient: Tensor, log_ratio: Tensor) -> Tensor:
    """In the dtype that came, finite in fp16 as well."""
    if log_ratio.dtype == torch.float16:
        coefficient = coefficient.clamp(max=SMALL_FLOAT_LIMIT)
    return coefficient.to(log_ratio.dtype)
