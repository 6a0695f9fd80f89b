"""The learner: one update of policy and critic from a batch of stale, mixed decisions, on any number of devices.

``update`` reads from top to bottom: evaluate the batch with the current parameters, recompute values and advantages
(bootstrap included), weigh every token by the objective, step. Every sum is over the global batch, so that one device
and many take the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from lightning.fabric import Fabric
from torch import Tensor

from data.batches import DecisionBatch
from data.types import Source, UserError
from wm_rl.guarantees import guarantee_metrics, penalty_sums
from wm_rl.objectives import Objective, surrogate_loss
from wm_rl.policy import TokenPolicy
from wm_rl.returns import gae
from wm_rl.staleness import staleness_metrics, staleness_sums
from wm_rl.trust import Trust

ROWS = 128
"""Forward passes are padded to a multiple of this. Batches differ in their number of decisions, and CPU kernels are
compiled and cached per shape: unpadded, a run grew by 10 MB per update."""


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """Knobs of the update."""

    learning_rate: float
    encoder_learning_rate: float
    value_learning_rate: float
    trace: float
    """λ of GAE, per decision."""
    entropy_coefficient: float
    kl_coefficient: float
    """Pull towards the warm-start policy: full-distribution KL(current ‖ warm start), per token."""
    centre_advantages: bool
    """Subtract the mean advantage. Off: it flips signs, and with them PPO's clip side and GIPO's β₊/β₋."""
    value_warmup: int
    """First updates, which train only the critic."""
    max_gradient_norm: float
    ratio: str = "token"
    """``token``: an objective sees each action token's log-ratio. ``joint``: the sum over a decision's tokens, whose
    spread grows with their number."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("learning_rate", "value_learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"learner.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.trace <= 1:
            raise UserError(f"learner.trace must lie in [0, 1], got {self.trace}; try learner.trace=0.95")
        if self.ratio not in ("token", "joint"):
            raise UserError(f"learner.ratio: expected token or joint, got {self.ratio!r}")


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


class Learner:
    """Owns the policy, its warm-start reference and the optimiser; ``fabric`` owns devices, precision and ranks."""

    def __init__(
        self, config: LearnerConfig, *, fabric: Fabric, policy: TokenPolicy, reference: TokenPolicy,
        objective: Objective, trust: Trust,
    ) -> None:
        """``policy`` is trained in place; ``reference`` is only evaluated."""
        self.config, self.fabric, self.objective, self.trust = config, fabric, objective, trust
        self.policy = policy
        self.reference = fabric.to_device(reference).requires_grad_(False)
        encoder, value = list(policy.encoder_parameters()), list(policy.value_parameters())
        special = {id(parameter) for parameter in (*encoder, *value)}
        rest = [parameter for parameter in policy.parameters() if id(parameter) not in special]
        optimizer = torch.optim.Adam(
            [{"params": rest, "lr": config.learning_rate},
             {"params": encoder, "lr": config.encoder_learning_rate},
             {"params": value, "lr": config.value_learning_rate}], eps=1e-5)
        self.module, self.optimizer = fabric.setup(policy, optimizer)

    def update(self, batch: DecisionBatch) -> dict[str, float]:
        """One gradient step on this rank's share of the global batch. Advances ``policy.version``.

        ``batch`` may hold different numbers of decisions on different ranks; at least one anywhere.
        """
        config, mask = self.config, batch.mask
        inputs = self._gather(batch)
        output = self.module(*inputs)
        count = int(mask.sum())
        log_probs = output.logits[:count].float().log_softmax(dim=-1)
        log_prob = log_probs.gather(-1, batch.token[mask][..., None].long())[..., 0]
        token_mask = batch.token_mask[mask]
        log_ratio = torch.where(token_mask[:, :, None], log_prob.detach() - batch.log_prob[mask], 0.0)
        targets = self._targets(batch, output.value[: count + len(mask)].detach().float(), count)
        if config.ratio == "joint":
            log_ratio = log_ratio.sum(dim=(1, 2), keepdim=True).expand_as(log_ratio)
        names = list(Source)
        origin = torch.tensor([names.index(Source(name)) for name in batch.source], device=mask.device)
        origin = origin.repeat_interleave(mask.sum(dim=1))
        coefficient = self.objective.coefficient(log_ratio, targets.advantage, self.trust.width(origin))

        policy_loss = surrogate_loss(log_prob, coefficient, targets.advantage, targets.weight)
        entropy = -(targets.weight * (log_probs.exp() * log_probs).sum(dim=-1)).sum()
        kl = self._divergence_from_reference(inputs, log_probs, targets.weight)
        value_error = (output.value[:count].float() - targets.value).square()
        value_loss = 0.5 * (targets.decision_weight * value_error).sum()
        acts = 0.0 if self.policy.version < config.value_warmup else 1.0
        loss = acts * (policy_loss - config.entropy_coefficient * entropy + config.kl_coefficient * kl) + value_loss

        metrics = self._diagnose(batch, targets, log_ratio, coefficient, origin, torch.stack([entropy, kl, value_loss]))

        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=config.max_gradient_norm, error_if_nonfinite=True)
        self.optimizer.step()

        self.policy.version += 1
        return {**metrics, "gradient_norm": float(norm) if norm is not None else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: policy, reference, optimiser, version."""
        return {"policy": self.policy.state_dict(), "reference": self.reference.state_dict(),
                "optimizer": self.optimizer.state_dict(), "version": self.policy.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self.policy.load_state_dict(state["policy"])
        self.reference.load_state_dict(state["reference"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.version = state["version"]

    def _diagnose(
        self, batch: DecisionBatch, targets: Targets, log_ratio: Float[Tensor, "n k a"],
        coefficient: Float[Tensor, "n k a"], origin: Int[Tensor, " n"], losses: Float[Tensor, " 3"],
    ) -> dict[str, float]:
        """What all ranks together made of this batch. ``losses``: entropy, KL, value loss."""
        mask, token_mask, world = batch.mask, batch.token_mask[batch.mask], self.fabric.world_size
        penalties = penalty_sums(log_ratio=log_ratio, coefficient=coefficient, advantage=targets.advantage,
                                 token_mask=token_mask)
        sums = staleness_sums(
            log_ratio=log_ratio, coefficient=coefficient, advantage=targets.advantage,
            gradient=targets.weight * coefficient * targets.advantage, token_mask=token_mask,
            policy_version=batch.policy_version[mask], origin=origin, version=self.policy.version)
        # `weight` already carries the number of ranks, so each of these is this rank's part of a global mean.
        discount = (targets.decision_weight * batch.discount[mask]).sum()[None]
        windows = torch.full_like(discount, float(len(mask)) * world)
        own = torch.cat([losses, discount, windows]).detach().double() / world
        total = self._sum_over_ranks(torch.cat([own, penalties.sums, sums.flatten()]))
        entropy, kl, value_loss, mean_discount, all_windows = total[:5].tolist()
        metrics = {"entropy": entropy, "value_loss": value_loss, **staleness_metrics(total[10:].view_as(sums)),
                   **guarantee_metrics(total[5:10], float(self._reduce(penalties.largest, "max")),
                                       bound=self.objective.bound(self.trust.widest()), discount=mean_discount,
                                       windows=round(all_windows))}
        if self.config.kl_coefficient > 0:  # without the pull it is not computed
            metrics["kl_to_warm_start"] = kl
        return metrics

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        return self._reduce(values, "sum")

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        reduced = self.fabric.all_reduce(values, reduce_op=how)
        assert isinstance(reduced, Tensor)
        return reduced

    def _gather(self, batch: DecisionBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs of one forward pass: the valid decisions, then each window's final observation, then padding."""
        windows = batch.mask.nonzero()[:, 0]
        own = torch.cat([windows, torch.arange(len(batch.mask), device=windows.device)])
        padding = -len(own) % ROWS

        def rows(decisions: Tensor, final: Tensor) -> Tensor:
            filled = torch.cat([decisions[batch.mask], final])
            return torch.cat([filled, filled[:1].expand(padding, *filled.shape[1:])])

        frames = {camera: rows(values, batch.final_frames[camera]) for camera, values in batch.frames.items()}
        words = self.policy.words(batch.instruction)[own]
        words = torch.cat([words, words[:1].expand(padding, -1)])
        return frames, rows(batch.proprio, batch.final_proprio), words

    def _targets(self, batch: DecisionBatch, values: Float[Tensor, " m"], count: int) -> Targets:
        mask, token_mask = batch.mask, batch.token_mask[batch.mask]
        value = torch.zeros(mask.shape, device=values.device)
        value[mask] = values[:count]
        advantage, target = gae(
            reward=batch.reward, value=value, final_value=values[count:], discount=batch.discount, mask=mask,
            terminated=batch.terminated, trace=self.config.trace)
        advantage = advantage[mask]
        dims = batch.token.shape[-1]
        own = torch.stack([advantage.double().sum(), advantage.double().square().sum(), mask.sum().double(),
                           token_mask.sum().double() * dims])
        total, squares, decisions, tokens = self._sum_over_ranks(own).unbind()
        mean = total / decisions
        deviation = (squares / decisions - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6)
        if self.config.centre_advantages:
            advantage = advantage - mean
        scaled = rearrange((advantage / deviation).float(), "n -> n 1 1")
        trust = self.trust.weight(batch.uncertainty[mask])
        world = self.fabric.world_size  # ranks' gradients are averaged, so each is scaled up by their number
        weight = (token_mask * trust[:, None])[:, :, None].expand(-1, -1, dims) * (world / tokens)
        return Targets(advantage=scaled, value=target[mask], weight=weight.float(),
                       decision_weight=torch.full_like(advantage, world / float(decisions)).float())

    def _divergence_from_reference(
        self, inputs: tuple[dict[str, Tensor], Tensor, Tensor], log_probs: Float[Tensor, "n k a v"],
        weight: Float[Tensor, "n k a"],
    ) -> Float[Tensor, ""]:
        """Weighted sum over tokens of KL(current ‖ warm start)."""
        if self.config.kl_coefficient == 0:
            return torch.zeros((), device=log_probs.device)
        with torch.no_grad(), self.fabric.autocast():
            anchor = self.reference(*inputs).logits[: len(log_probs)]
        gap = log_probs - anchor.float().log_softmax(dim=-1)
        return (weight * (log_probs.exp() * gap).sum(dim=-1)).sum()
