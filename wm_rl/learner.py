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
from jaxtyping import Float
from lightning.fabric import Fabric
from torch import Tensor

from data.types import DecisionBatch, UserError
from wm_rl.objectives import Objective, surrogate_loss
from wm_rl.policy import TinyVLA
from wm_rl.returns import gae
from wm_rl.staleness import staleness_metrics, staleness_sums

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
    trust_temperature: float
    """Imagined samples weigh ``exp(−uncertainty / trust_temperature)``."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("learning_rate", "value_learning_rate", "max_gradient_norm", "trust_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"learner.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.trace <= 1:
            raise UserError(f"learner.trace must lie in [0, 1], got {self.trace}; try learner.trace=0.95")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What a batch's decisions are worth under the current critic; rows are the valid decisions."""

    advantage: Float[Tensor, "n 1 1"]
    """Divided by its deviation over the global batch."""
    value: Float[Tensor, " n"]
    weight: Float[Tensor, "n k a"]
    """Mask × trust in imagined data ÷ number of valid tokens in the global batch × number of ranks."""
    decision_weight: Float[Tensor, " n"]
    """The same normaliser, per decision."""


class Learner:
    """Owns the policy, its warm-start reference and the optimiser; ``fabric`` owns devices, precision and ranks."""

    def __init__(
        self, config: LearnerConfig, *, fabric: Fabric, policy: TinyVLA, reference: TinyVLA, objective: Objective
    ) -> None:
        """``policy`` is trained in place; ``reference`` is only evaluated."""
        self.config, self.fabric, self.objective = config, fabric, objective
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
        targets = self._targets(batch, output.value[: count + len(mask)].detach().float(), count)

        log_probs = output.logits[:count].float().log_softmax(dim=-1)
        log_prob = log_probs.gather(-1, batch.token[mask][..., None].long())[..., 0]
        log_ratio = log_prob.detach() - batch.log_prob[mask]
        source = [name for name, row in zip(batch.source, mask.tolist(), strict=True) for _ in range(sum(row))]
        coefficient = self.objective.coefficient(log_ratio, targets.advantage, source)

        policy_loss = surrogate_loss(log_prob, coefficient, targets.advantage, targets.weight)
        entropy = -(targets.weight * (log_probs.exp() * log_probs).sum(dim=-1)).sum()
        kl = self._divergence_from_reference(inputs, log_probs, targets.weight)
        value_error = (output.value[:count].float() - targets.value).square()
        value_loss = 0.5 * (targets.decision_weight * value_error).sum()
        acts = 0.0 if self.policy.version < config.value_warmup else 1.0
        loss = acts * (policy_loss - config.entropy_coefficient * entropy + config.kl_coefficient * kl) + value_loss

        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=config.max_gradient_norm, error_if_nonfinite=True)
        self.optimizer.step()

        world = self.fabric.world_size
        sums = staleness_sums(
            log_ratio=log_ratio, coefficient=coefficient,
            gradient=targets.weight * coefficient * targets.advantage, token_mask=batch.token_mask[mask],
            policy_version=batch.policy_version[mask], source=source, version=self.policy.version)
        # `weight` already carries the number of ranks, so each of these is this rank's part of a global mean.
        own = torch.stack([entropy, kl, value_loss]).detach().double() / world
        both = self._sum_over_ranks(torch.cat([own, sums.flatten()]))
        self.policy.version += 1
        metrics = {"entropy": float(both[0]), "value_loss": float(both[2]),
                   "gradient_norm": float(norm) if norm is not None else 0.0,
                   **staleness_metrics(both[3:].view_as(sums))}
        if config.kl_coefficient > 0:  # without the pull it is not computed
            metrics["kl_to_warm_start"] = float(both[1])
        return metrics

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

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        summed = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

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
        trust = torch.exp(-batch.uncertainty[mask] / self.config.trust_temperature)
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
