"""What the decisions of a batch are worth under the current critic, scaled alike on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from lightning.fabric import Fabric
from torch import Tensor

from data.batches import DecisionBatch
from wm_rl.fabric import reduce
from wm_rl.returns import gae
from wm_rl.trust import Trust


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a batch's decisions are worth under the current critic; rows are the valid decisions."""

    advantage: Float[Tensor, "n 1 1"]
    """Divided by its deviation over the global batch."""
    value: Float[Tensor, " n"]
    weight: Float[Tensor, "n k a"]
    """Mask × trust ÷ number of valid tokens in the global batch × number of ranks."""
    decision_weight: Float[Tensor, " n"]
    """The same normaliser, per decision."""

    def rows(self, first: int, end: int) -> Targets:
        """Of these decisions alone."""
        return Targets(advantage=self.advantage[first:end], value=self.value[first:end],
                       weight=self.weight[first:end], decision_weight=self.decision_weight[first:end])


def targets_of(
    batch: DecisionBatch, *, value: Float[Tensor, " n"], final_value: Float[Tensor, " b"], trace: float, centre: bool,
    trust: Trust, fabric: Fabric,
) -> Targets:
    """Targets of this rank's share. Every rank calls it: means, deviation and counts are the global batch's.

    Args:
        batch: ``n`` valid decisions in ``b`` windows.
        value: of each decision, detached.
        final_value: of the observation after each window, detached.
        trace: λ of GAE, per decision.
        centre: subtract the mean advantage.
        trust: how much imagined decisions weigh.
        fabric: the ranks.
    """
    mask, token_mask = batch.mask, batch.token_mask[batch.mask]
    values = torch.zeros(mask.shape, device=mask.device)
    values[mask] = value
    advantages, target = gae(reward=batch.reward, value=values, final_value=final_value, discount=batch.discount,
                             mask=mask, terminated=batch.terminated, trace=trace)
    advantage = advantages[mask]
    dims = batch.token.shape[-1]
    own = torch.stack([advantage.double().sum(), advantage.double().square().sum(), mask.sum().double(),
                       token_mask.sum().double() * dims])
    total, squares, decisions, tokens = reduce(fabric, own, "sum").unbind()
    mean = total / decisions
    deviation = (squares / decisions - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
    if centre:
        advantage = advantage - mean
    world = fabric.world_size  # ranks' gradients are averaged, so each is scaled up by their number
    trusted = (token_mask * trust.weight(batch.uncertainty[mask])[:, None])[:, :, None]
    return Targets(advantage=rearrange((advantage / deviation).float(), "n -> n 1 1"), value=target[mask],
                   weight=(trusted.expand(-1, -1, dims) * (world / tokens)).float(),
                   decision_weight=torch.full_like(advantage, world / float(decisions)).float())
