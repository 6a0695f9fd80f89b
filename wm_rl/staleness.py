"""How stale the data is and how much of it still counts: sums per lag bucket and per source, reduced over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.types import Source
from wm_rl.objectives import Gipo, NoClip, Objective, PpoClip, Sapo, TruncatedIs
from wm_rl.objectives.base import ratio

LAG_EDGES = (0, 20, 50, 100, 200, 400)
"""Lower edges of the lag buckets, in policy versions (gradient updates); the last is open."""

NOT_OURS = "not_ours"
BUCKETS = (*(f"lag_{low}_{high}" for low, high in pairwise(LAG_EDGES)),
           f"lag_{LAG_EDGES[-1]}_up", NOT_OURS)
"""Names of the buckets; ``not_ours`` holds what a script or a human acted, whose log-prob is a clone's."""

UTILISED = 0.1
"""A token counts as used when its coefficient exceeds this. 'Non-zero' would be vacuous for a Gaussian."""

PANEL: Mapping[str, Objective] = {
    "ppo_0.2": PpoClip(epsilon=0.2), "ppo_1.0": PpoClip(epsilon=1.0), "sapo": Sapo(tau_positive=1.0, tau_negative=1.05),
    "no_clip": NoClip(), "truncated_is": TruncatedIs(cap=1.0), "gipo_0.5": Gipo(beta=0.5), "gipo_1.0": Gipo(beta=1.0)}
"""Objectives that every batch is scored with as well: what each would have used of it."""

QUANTILES = (0.5, 0.95)
_LOG_RATIO_EDGES = np.concatenate([[0.0], np.logspace(-4, 1.5, 56)])
"""Bins of ``|log r|``: a histogram can be added over ranks, quantiles cannot."""
_BINS = len(_LOG_RATIO_EDGES)

_PLAIN = ("tokens", "lag", "abs_log_ratio", "coefficient", "coefficient_squared", "utilised", "suppressed", "gradient")
_SCORED = tuple(f"{name}/{what}" for name in PANEL for what in ("coefficient", "coefficient_squared", "utilised"))
SUMS = (*_PLAIN, *(f"bin_{i}" for i in range(_BINS)), *_SCORED)


def lag_bucket(policy_version: Int[Tensor, " n"], version: int) -> Int[Tensor, " n"]:
    """Place in ``BUCKETS`` of each decision."""
    lag = (version - policy_version).clamp(min=0)
    bucket = torch.bucketize(lag, torch.tensor(LAG_EDGES[1:], device=lag.device), right=True)
    return torch.where(policy_version < 0, len(BUCKETS) - 1, bucket)


def staleness_sums(
    *,
    log_ratio: Float[Tensor, "n k a"],
    coefficient: Float[Tensor, "n k a"],
    gradient: Float[Tensor, "n k a"],
    advantage: Float[Tensor, "n 1 1"],
    token_mask: Bool[Tensor, "n k"],
    policy_version: Int[Tensor, " n"],
    origin: Int[Tensor, " n"],
    version: int,
) -> Float[Tensor, "g s"]:
    """One row per bucket then per source, one column per entry of ``SUMS``: ready to be all-reduced by adding.

    ``origin`` is a source's place in ``Source``; ``gradient`` is ``|∂ loss / ∂ log π|`` per token, so its share by
    source is each source's pull on the update.
    """
    bucket = lag_bucket(policy_version, version)
    groups = torch.cat([bucket == torch.arange(len(BUCKETS), device=bucket.device)[:, None],
                        origin == torch.arange(len(Source), device=bucket.device)[:, None]]).double()
    real = token_mask[:, :, None].expand_as(log_ratio)
    lag = torch.where(policy_version < 0, 0, (version - policy_version).clamp(min=0))
    x, c = log_ratio.detach(), coefficient.detach()

    def summed(values: Tensor) -> Tensor:
        """``[n]``, over the real tokens of each decision."""
        return torch.where(real, values.double(), 0.0).sum(dim=(1, 2))

    tokens = summed(torch.ones_like(x))
    columns = [tokens, lag * tokens, summed(x.abs()), summed(c), summed(c.square()), summed(c > UTILISED),
               summed(c < UTILISED * ratio(x)), summed(gradient.detach().abs())]
    edges = torch.tensor(_LOG_RATIO_EDGES[1:], device=x.device, dtype=torch.float32)
    place = torch.bucketize(x.abs().float().contiguous(), edges, right=True)
    histogram = torch.zeros(len(x), _BINS, dtype=torch.float64, device=x.device)
    histogram.scatter_add_(1, place.flatten(1), real.double().flatten(1))
    width = torch.ones_like(advantage)
    for objective in PANEL.values():
        other = objective.coefficient(x, advantage, width)
        columns += [summed(other), summed(other.square()), summed(other > UTILISED)]
    plain = len(_PLAIN)
    per_row = torch.cat([torch.stack(columns[:plain], dim=1), histogram, torch.stack(columns[plain:], dim=1)], dim=1)
    return groups @ per_row


def staleness_metrics(sums: Float[Tensor, "g s"]) -> dict[str, float]:
    """Means, quantiles, effective sample size and shares from summed rows; a group without tokens is left out.

    ``utilisation`` is the share of tokens with a coefficient above ``UTILISED``; ``suppressed`` the share whose
    coefficient is below ``UTILISED`` of their ratio: what the objective, not the policy, took away. What the other
    objectives would have used of each lag bucket is under ``counterfactual/<objective>/<bucket>/``.
    """
    rows = [dict(zip(SUMS, row, strict=True)) for row in sums.tolist()]
    total_gradient = sum(row["gradient"] for row in rows[len(BUCKETS):])
    metrics: dict[str, float] = {}
    for name, row in zip((*BUCKETS, *Source), rows, strict=True):
        tokens = row["tokens"]
        if tokens == 0:
            continue
        metrics |= {f"staleness/{name}/tokens": tokens, f"staleness/{name}/lag": row["lag"] / tokens,
                    f"staleness/{name}/abs_log_ratio": row["abs_log_ratio"] / tokens,
                    f"staleness/{name}/effective_sample_share": _share(row, tokens),
                    f"staleness/{name}/utilisation": row["utilised"] / tokens,
                    f"staleness/{name}/suppressed": row["suppressed"] / tokens}
        counts = np.array([row[f"bin_{i}"] for i in range(_BINS)])
        for quantile in QUANTILES:
            metrics[f"staleness/{name}/abs_log_ratio_p{quantile * 100:.0f}"] = _quantile(counts, quantile)
        if name in list(Source):
            metrics[f"gradient_share/{name}"] = row["gradient"] / total_gradient if total_gradient else 0.0
            continue
        for other in PANEL:
            own = {what: row[f"{other}/{what}"] for what in ("coefficient", "coefficient_squared", "utilised")}
            metrics[f"counterfactual/{other}/{name}/utilisation"] = own["utilised"] / tokens
            metrics[f"counterfactual/{other}/{name}/effective_sample_share"] = _share(own, tokens)
    return metrics


def _share(row: Mapping[str, float], tokens: float) -> float:
    squares = row["coefficient_squared"]
    return row["coefficient"] ** 2 / (tokens * squares) if squares else 0.0


def _quantile(counts: np.ndarray, quantile: float) -> float:
    """Linear within a bin; the last bin is open and gives its lower edge."""
    ends = counts.cumsum()
    wanted = quantile * ends[-1]
    place = int(np.searchsorted(ends, wanted))
    low = _LOG_RATIO_EDGES[place]
    high = _LOG_RATIO_EDGES[min(place + 1, _BINS - 1)]
    inside = (wanted - (ends[place] - counts[place])) / counts[place] if counts[place] else 0.0
    return float(low + inside * (high - low))
