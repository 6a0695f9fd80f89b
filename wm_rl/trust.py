"""How far data is trusted, by where it came from and how old it is.

Objectives know log-ratios and advantages only. What else there is to know of a decision, its source, its lag and how
unsure the world model was, reaches the update here: as a factor on the objective's width, and as a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.types import Source, UserError
from wm_rl.objectives import Objective
from wm_rl.staleness import BUCKETS

GROUPS = len(Source) * len(BUCKETS)
"""A group is a source and a lag bucket: ``source · buckets + bucket``."""

_FACTORS = torch.logspace(-3, 3, 25, base=2.0)
"""Widths that adaptation chooses among, as factors on the objective's own."""

_RATE = 0.05
"""Share of the way to the chosen width (in its logarithm) that one update goes."""


@dataclass(frozen=True, kw_only=True)
class TrustConfig:
    """Knobs of trust."""

    width_source: Mapping[str, float] = field(default_factory=dict)
    """Factor on the objective's width for a source, e.g. ``{imagined: 0.5}``; 1 where not named."""
    imagined_temperature: float = 2.0
    """Decisions weigh ``exp(−uncertainty / temperature)``; only imagined ones are uncertain."""
    effective_share: float | None = None
    """Hold the effective sample size of each source and lag bucket at this share of its tokens, by adapting the
    width; null: the width stays."""
    scale_learning_rate: bool = False
    """Multiply the policy's learning rate by the batch's effective sample share (after VCPO, arXiv 2602.17616)."""

    def __post_init__(self) -> None:
        """Refuse what is no trust."""
        for name, factor in self.width_source.items():
            if name not in list(Source):
                raise UserError(f"trust.width_source names '{name}'; sources are {', '.join(Source)}")
            if not factor > 0:
                raise UserError(f"trust.width_source.{name} must be positive, got {factor}")
        if not self.imagined_temperature > 0:
            raise UserError(f"trust.imagined_temperature must be positive, got {self.imagined_temperature}")
        if self.effective_share is not None and not 0 < self.effective_share <= 1:
            raise UserError(f"trust.effective_share must lie in (0, 1] or be null, got {self.effective_share}")


class Trust:
    """Widths of all groups; adapted by ``observe`` when the config asks for it."""

    def __init__(self, config: TrustConfig) -> None:
        self.config = config
        factors = [config.width_source.get(source.value, 1.0) for source in Source for _ in BUCKETS]
        self.log_width = torch.tensor(factors).log()
        """``[GROUPS]``, natural logarithm of the factor on the objective's width."""

    def width(self, group: Int[Tensor, " n"]) -> Float[Tensor, "n 1 1"]:
        """Factor on the objective's width of each decision."""
        return self.log_width.exp().to(group.device)[group][:, None, None]

    def weight(self, uncertainty: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Weight of each decision."""
        return torch.exp(-uncertainty / self.config.imagined_temperature)

    def observe(
        self, objective: Objective, *, log_ratio: Float[Tensor, "n k a"], advantage: Float[Tensor, "n 1 1"],
        token_mask: Bool[Tensor, "n k"], group: Int[Tensor, " n"], total: Callable[[Tensor], Tensor],
    ) -> None:
        """Move each group's width towards the largest one that keeps its effective share, for the next update.

        Where none keeps it, towards the one with the largest share: a width of nearly 0 trusts too few tokens to have
        a large one. ``total`` sums over ranks.
        """
        if self.config.effective_share is None:
            return
        member = torch.zeros(GROUPS, len(group), dtype=torch.float64, device=group.device)
        member[group, torch.arange(len(group), device=group.device)] = 1
        real = token_mask[:, :, None].expand_as(log_ratio).double()
        rows = [member @ real.sum(dim=(1, 2))]
        for factor in _FACTORS.tolist():
            c = objective.coefficient(log_ratio, advantage, torch.full_like(advantage, factor)).double() * real
            rows += [member @ c.sum(dim=(1, 2)), member @ c.square().sum(dim=(1, 2))]
        tokens, *sums = total(torch.stack(rows)).cpu()
        share = torch.stack([s.square() / (tokens * squares).clamp(min=1e-30)
                             for s, squares in zip(sums[::2], sums[1::2], strict=True)])
        keeps = share >= self.config.effective_share
        widest = keeps.double().mul(torch.arange(1, len(_FACTORS) + 1)[:, None]).argmax(dim=0)
        chosen = torch.where(keeps.any(dim=0), widest, share.argmax(dim=0))
        target = _FACTORS[chosen].log()
        self.log_width = torch.where(tokens > 0, torch.lerp(self.log_width, target, _RATE), self.log_width)

    def metrics(self) -> dict[str, float]:
        """Mean width factor of each source's groups, where it is adapted."""
        if self.config.effective_share is None:
            return {}
        widths = self.log_width.exp().view(len(Source), len(BUCKETS))
        return {f"trust/{source}/{bucket}/width": float(widths[i, j])
                for i, source in enumerate(Source) for j, bucket in enumerate(BUCKETS)}


def groups(origin: Int[Tensor, " n"], bucket: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The group of each decision, of its source's place in ``Source`` and its lag bucket."""
    return origin * len(BUCKETS) + bucket
