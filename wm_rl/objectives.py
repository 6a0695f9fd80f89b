"""Policy objectives: how much each stale action token may move the policy.

Every objective here is a surrogate J whose gradient is ``E[c · A · ∇ log π]``; they differ only in the *coefficient*
``c(log r, A)``, with ``log r = log π − log π_behaviour`` per token. An objective is therefore one method,
``coefficient``, and one shared loss turns it into a gradient. The coefficient is always detached: for GIPO, letting
the gradient through the trust weight would change the update's sign above ``r = exp(β²)``.

Exponents are fused or bounded before ``exp``, so no log-ratio gives an infinity or a NaN in fp32 or bf16.

Axes: ``n`` valid decisions (any batch shape works), ``k`` actions in a chunk, ``a`` action dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from data.types import Source, UserError

LOG_RATIO_LIMIT = 20.0
"""Objectives without a trust weight of their own bound log r here: exp(20) = 4.9e8 is finite in fp32 and bf16."""


@runtime_checkable
class Objective(Protocol):
    """A surrogate, known by its gradient coefficient."""

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], source: Sequence[Source]
    ) -> Float[Tensor, "n k a"]:
        """``c`` such that the surrogate's gradient is ``E[c · A · ∇ log π]``; ``source[i]`` is that of row ``i``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Gipo:
    """Gaussian importance sampling policy optimisation (arXiv 2603.03955): ``J = E[w r A]``.

    ``w = exp(−½ (sg[log r] / β)²)``, so ``c = w r = exp(log r − ½ (log r / β)²)``, at most ``exp(β²/2)`` (reached at
    ``r = exp(β²)``). The smaller β, the closer to on-policy data a token must be to count.
    """

    beta: float
    """Width of the trust weight in log-ratio."""
    beta_positive: float | None
    """β where the advantage is positive; null: ``beta``."""
    beta_negative: float | None
    """β where the advantage is negative; null: ``beta``."""
    beta_source: Mapping[str, float] = field(default_factory=dict)
    """Factor on β for a source, e.g. ``{imagined: 0.5}``; 1 where not named."""

    def __post_init__(self) -> None:
        """Refuse widths that are no widths, and sources that do not exist."""
        for name in ("beta", "beta_positive", "beta_negative"):
            width = getattr(self, name)
            if width is not None and not width > 0:
                raise UserError(f"objective.{name} must be positive, got {width}; try objective.{name}=0.5")
        for name, factor in self.beta_source.items():
            if name not in list(Source):
                raise UserError(f"objective.beta_source names '{name}'; sources are {', '.join(Source)}")
            if not factor > 0:
                raise UserError(f"objective.beta_source.{name} must be positive, got {factor}")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], source: Sequence[Source]
    ) -> Float[Tensor, "n k a"]:
        """``exp(log r − ½ (log r / β)²)`` with the exponent formed first: at most β²/2, so nothing overflows."""
        positive = self.beta if self.beta_positive is None else self.beta_positive
        negative = self.beta if self.beta_negative is None else self.beta_negative
        factor = torch.tensor([self.beta_source.get(name, 1.0) for name in source], device=log_ratio.device)
        beta = torch.where(advantage >= 0, positive, negative) * factor[:, None, None]
        x = log_ratio.detach().float()
        return torch.exp(x - 0.5 * (x / beta).square()).to(log_ratio.dtype)


@dataclass(frozen=True, kw_only=True)
class PpoClip:
    """PPO's clipped surrogate ``J = E[min(r A, clip(r, 1−ε, 1+ε) A)]`` (arXiv 1707.06347, eq. 7)."""

    epsilon: float

    def __post_init__(self) -> None:
        """Refuse a clip range that is none."""
        if not self.epsilon > 0:
            raise UserError(f"objective.epsilon must be positive, got {self.epsilon}; try objective.epsilon=0.2")

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], source: Sequence[Source]
    ) -> Float[Tensor, "n k a"]:
        """``r`` where the minimum is the unclipped term, else 0."""
        ratio = _ratio(log_ratio)
        clipped = torch.where(advantage >= 0, ratio > 1 + self.epsilon, ratio < 1 - self.epsilon)
        return torch.where(clipped, 0.0, ratio).to(log_ratio.dtype)


@dataclass(frozen=True, kw_only=True)
class Sapo:
    """Soft adaptive policy optimisation (arXiv 2511.20347): ``J = E[(4/τ) σ(τ (r − 1)) A]``, τ by the sign of A."""

    tau_positive: float
    tau_negative: float

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], source: Sequence[Source]
    ) -> Float[Tensor, "n k a"]:
        """``4 σ(z) σ(−z) r`` with ``z = τ (r − 1)``: 1 on policy, vanishing on both sides."""
        ratio = _ratio(log_ratio)
        gate = torch.where(advantage >= 0, self.tau_positive, self.tau_negative) * (ratio - 1)
        return (4 * torch.sigmoid(gate) * torch.sigmoid(-gate) * ratio).to(log_ratio.dtype)


@dataclass(frozen=True, kw_only=True)
class NoClip:
    """Plain importance sampling ``J = E[r A]``: unbiased, of unbounded variance."""

    def coefficient(
        self, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"], source: Sequence[Source]
    ) -> Float[Tensor, "n k a"]:
        """The ratio itself."""
        return _ratio(log_ratio).to(log_ratio.dtype)


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


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().float().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
