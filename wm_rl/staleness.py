"""How stale the data is and how much of it still counts: sums per lag bucket and per source, reduced over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.types import Source

LAG_EDGES = (0, 20, 100, 300)
"""Lower edges of the lag buckets, in policy versions (gradient updates); the last is open."""

BUCKETS = ("lag_0_20", "lag_20_100", "lag_100_300", "lag_300_up", "not_ours")
"""Names of the buckets; ``not_ours`` holds what a script or a human acted, whose log-prob is a clone's."""

UTILISED = 0.1
"""A token counts as used when its coefficient exceeds this. 'Non-zero' would be vacuous for a Gaussian."""

SUMS = ("tokens", "lag", "abs_log_ratio", "coefficient", "coefficient_squared", "utilised", "gradient")


def staleness_sums(
    *,
    log_ratio: Float[Tensor, "n k a"],
    coefficient: Float[Tensor, "n k a"],
    gradient: Float[Tensor, "n k a"],
    token_mask: Bool[Tensor, "n k"],
    policy_version: Int[Tensor, " n"],
    source: Sequence[Source],
    version: int,
) -> Float[Tensor, "g s"]:
    """One row per bucket then per source, one column per entry of ``SUMS``: ready to be all-reduced by adding.

    ``gradient`` is ``|∂ loss / ∂ log π|`` per token, so its share by source is each source's pull on the update.
    """
    lag = (version - policy_version).clamp(min=0)
    bucket = torch.bucketize(lag, torch.tensor(LAG_EDGES[1:], device=lag.device), right=True)
    bucket = torch.where(policy_version < 0, len(BUCKETS) - 1, bucket)
    names = list(Source)
    origin = torch.tensor([names.index(name) for name in source], device=lag.device)
    groups = torch.cat([bucket == torch.arange(len(BUCKETS), device=lag.device)[:, None],
                        origin == torch.arange(len(names), device=lag.device)[:, None]]).double()
    real = token_mask[:, :, None].expand_as(log_ratio).double()
    known_lag = torch.where(policy_version < 0, 0, lag)[:, None, None].expand_as(log_ratio)
    x, c = log_ratio.detach().double(), coefficient.detach().double()
    per_token = torch.stack([torch.ones_like(x), known_lag.double(), x.abs(), c, c.square(), (c > UTILISED).double(),
                             gradient.detach().abs().double()])
    per_row = (per_token * real).sum(dim=(2, 3))
    return groups @ per_row.T


def staleness_metrics(sums: Float[Tensor, "g s"]) -> dict[str, float]:
    """Means, effective sample size and shares from summed rows; a group without tokens is left out."""
    total_gradient = float(sums[len(BUCKETS):, SUMS.index("gradient")].sum())
    metrics: dict[str, float] = {}
    for name, row in zip((*BUCKETS, *Source), sums.tolist(), strict=True):
        tokens, lag, log_ratio, c, c_squared, utilised, gradient = row
        if tokens == 0:
            continue
        metrics[f"staleness/{name}/tokens"] = tokens
        metrics[f"staleness/{name}/lag"] = lag / tokens
        metrics[f"staleness/{name}/abs_log_ratio"] = log_ratio / tokens
        metrics[f"staleness/{name}/effective_sample_share"] = c * c / (tokens * c_squared) if c_squared else 0.0
        metrics[f"staleness/{name}/utilisation"] = utilised / tokens
        if name in list(Source):
            metrics[f"gradient_share/{name}"] = gradient / total_gradient if total_gradient else 0.0
    return metrics
