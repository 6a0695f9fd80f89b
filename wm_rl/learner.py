"""The learner: one update of policy and critic from a batch of stale, mixed decisions, on any number of devices.

``update`` reads from top to bottom: evaluate the batch with the current parameters, recompute values and advantages
(bootstrap included), weigh every token by the objective, step. Every sum is over the global batch, so that one device
and many, one micro-batch and many, take the same step.
"""

from __future__ import annotations

import copy
import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from lightning.fabric import Fabric
from torch import Tensor

from data.batches import DecisionBatch, split_windows
from data.types import Source, UserError
from wm_rl.fabric import is_sharded, load_sharded, prepare, reduce, whole
from wm_rl.guarantees import guarantee_metrics, penalty_sums
from wm_rl.objectives import Objective, surrogate_loss
from wm_rl.policy import TokenPolicy
from wm_rl.staleness import staleness_metrics, staleness_sums
from wm_rl.targets import Targets, targets_of
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
    micro_batches: int = 1
    """Pieces that a rank cuts its share of a batch into. One piece's activations are in memory at a time; for two and
    more every piece is evaluated twice, as advantages need the values of all."""
    activation_checkpointing: bool = False
    """Keep only what enters the policy's ``blocks()`` and compute the rest again in the backward pass."""
    compile: bool = False
    """``torch.compile`` the policy that is trained; on a CPU this needs a C++ compiler."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("learning_rate", "value_learning_rate", "max_gradient_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"learner.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.trace <= 1:
            raise UserError(f"learner.trace must lie in [0, 1], got {self.trace}; try learner.trace=0.95")
        if self.micro_batches < 1:
            raise UserError(f"learner.micro_batches must be at least 1, got {self.micro_batches}")
        if self.ratio not in ("token", "joint"):
            raise UserError(f"learner.ratio: expected token or joint, got {self.ratio!r}")

    def check_share(self, windows: int, ranks: int) -> None:
        """Raise ``UserError`` unless a batch of so many windows leaves one for every micro-batch of every rank."""
        pieces = ranks * self.micro_batches
        if windows < pieces:
            raise UserError(f"replay.windows={windows}: expected at least {pieces}, one for each micro-batch of each "
                            f"rank ({ranks} ranks, learner.micro_batches={self.micro_batches}); type "
                            f"replay.windows={pieces}")


class Look(NamedTuple):
    """The current policy's view of some windows; ``n`` valid decisions, ``b`` windows."""

    inputs: tuple[dict[str, Tensor], Tensor, Tensor]
    log_probs: Float[Tensor, "n k a v"]
    log_prob: Float[Tensor, "n k a"]
    """Of the tokens that were taken."""
    value: Float[Tensor, " n"]
    final_value: Float[Tensor, " b"]
    """Of the observation after each window, detached."""


class Learner:
    """Owns the policy, its warm-start reference and the optimiser; ``fabric`` owns devices, precision and ranks."""

    def __init__(
        self, config: LearnerConfig, *, fabric: Fabric, policy: TokenPolicy, reference: TokenPolicy,
        objective: Objective, trust: Trust,
    ) -> None:
        """``policy`` is trained in place, or by ``gather`` where it is sharded. ``reference`` is only evaluated."""
        self.config, self.fabric, self.objective, self.trust = config, fabric, objective, trust
        self.policy = policy
        self.trained = copy.deepcopy(policy) if is_sharded(fabric) else policy
        if self.trained is not policy and fabric.is_global_zero:
            policy.to(fabric.device)  # the first rank acts
        self.reference = reference.to(fabric.device).requires_grad_(False)
        trained = self.trained
        self.module = prepare(fabric, trained, checkpointing=config.activation_checkpointing, compiled=config.compile)
        encoder, value = list(trained.encoder_parameters()), list(trained.value_parameters())
        special = {id(parameter) for parameter in (*encoder, *value)}
        rest = [parameter for parameter in trained.parameters() if id(parameter) not in special]
        self.optimizer: Any = fabric.setup_optimizers(torch.optim.Adam(
            [{"params": rest, "lr": config.learning_rate},
             {"params": encoder, "lr": config.encoder_learning_rate},
             {"params": value, "lr": config.value_learning_rate}], eps=1e-5))

    def update(self, batch: DecisionBatch) -> dict[str, float]:
        """One gradient step on this rank's share of the global batch. Advances ``policy.version``.

        ``batch`` may hold different numbers of decisions on different ranks, but a window for every micro-batch.
        """
        config, mask = self.config, batch.mask
        pieces = split_windows(batch, config.micro_batches)
        alone = len(pieces) == 1
        with torch.set_grad_enabled(alone):
            looks = [self._look(piece) for piece in pieces]
        log_prob = torch.cat([look.log_prob.detach() for look in looks])
        log_ratio = torch.where(batch.token_mask[mask][:, :, None], log_prob - batch.log_prob[mask], 0.0)
        targets = targets_of(
            batch, value=torch.cat([look.value.detach() for look in looks]),
            final_value=torch.cat([look.final_value for look in looks]), trace=config.trace,
            centre=config.centre_advantages, trust=self.trust, fabric=self.fabric)
        if config.ratio == "joint":
            log_ratio = log_ratio.sum(dim=(1, 2), keepdim=True).expand_as(log_ratio)
        names = list(Source)
        origin = torch.tensor([names.index(Source(name)) for name in batch.source], device=mask.device)
        origin = origin.repeat_interleave(mask.sum(dim=1))
        coefficient = self.objective.coefficient(log_ratio, targets.advantage, self.trust.width(origin))

        self.optimizer.zero_grad()
        losses = torch.zeros(3, device=mask.device)
        ends = list(itertools.accumulate(len(look.log_prob) for look in looks))
        for piece, look, first, end in zip(pieces, looks, [0, *ends], ends, strict=False):
            with nullcontext() if alone else self.fabric.no_backward_sync(self.module, enabled=end < ends[-1]):
                loss, parts = self._loss(look if alone else self._look(piece), coefficient[first:end],
                                         targets.rows(first, end))
                self.fabric.backward(loss)
            losses += parts.detach()
        metrics = self._diagnose(batch, targets, log_ratio, coefficient, origin, losses)
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=config.max_gradient_norm, error_if_nonfinite=True)
        self.optimizer.step()

        self.policy.version += 1
        return {**metrics, "gradient_norm": float(whole(norm)) if norm is not None else 0.0}

    def gather(self) -> None:
        """Bring ``policy`` up to what was trained, where no rank has all of it. Every rank calls it."""
        if self.trained is not self.policy:
            self.policy.load_state_dict(whole(self.trained.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors and plain values: policy, reference, optimiser, version. Every rank calls it."""
        return {"policy": whole(self.trained.state_dict()), "reference": self.reference.state_dict(),
                "optimizer": whole(self.optimizer.state_dict()), "version": self.policy.version}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of ``state_dict``, whatever the number of ranks it was made on. Every rank calls it."""
        self.policy.load_state_dict(state["policy"])
        self.reference.load_state_dict(state["reference"])
        if self.trained is self.policy:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            load_sharded(self.trained, self.optimizer, state["policy"], state["optimizer"])
        self.policy.version = state["version"]

    def _look(self, batch: DecisionBatch) -> Look:
        inputs = self._gather(batch)
        output = self.module(*inputs)
        count = int(batch.mask.sum())
        log_probs = output.logits[:count].float().log_softmax(dim=-1)
        value = output.value[: count + len(batch.mask)].float()
        return Look(inputs, log_probs, log_probs.gather(-1, batch.token[batch.mask][..., None].long())[..., 0],
                    value[:count], value[count:].detach())

    def _loss(
        self, look: Look, coefficient: Float[Tensor, "n k a"], targets: Targets
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " 3"]]:
        """The part of the global loss that is this piece's; and of entropy, KL and value loss."""
        config = self.config
        policy_loss = surrogate_loss(look.log_prob, coefficient, targets.advantage, targets.weight)
        entropy = -(targets.weight * (look.log_probs.exp() * look.log_probs).sum(dim=-1)).sum()
        kl = self._divergence_from_reference(look.inputs, look.log_probs, targets.weight)
        value_loss = 0.5 * (targets.decision_weight * (look.value - targets.value).square()).sum()
        acts = 0.0 if self.policy.version < config.value_warmup else 1.0
        loss = acts * (policy_loss - config.entropy_coefficient * entropy + config.kl_coefficient * kl) + value_loss
        return loss, torch.stack([entropy, kl, value_loss])

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
        total = reduce(self.fabric, torch.cat([own, penalties.sums, sums.flatten()]), "sum")
        entropy, kl, value_loss, mean_discount, all_windows = total[:5].tolist()
        metrics = {"entropy": entropy, "value_loss": value_loss, **staleness_metrics(total[10:].view_as(sums)),
                   **guarantee_metrics(total[5:10], float(reduce(self.fabric, penalties.largest, "max")),
                                       bound=self.objective.bound(self.trust.widest()), discount=mean_discount,
                                       windows=round(all_windows))}
        if self.config.kl_coefficient > 0:  # without the pull it is not computed
            metrics["kl_to_warm_start"] = kl
        return metrics

    def _gather(self, batch: DecisionBatch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Inputs of one forward pass: the valid decisions, then each window's final observation, then padding."""
        windows = batch.mask.nonzero()[:, 0]
        own = torch.cat([windows, torch.arange(len(batch.mask), device=windows.device)])
        padding = -len(own) % ROWS

        def rows(decisions: Tensor, final: Tensor) -> Tensor:
            filled = torch.cat([decisions[batch.mask], final])
            return torch.cat([filled, filled[:1].expand(padding, *filled.shape[1:])])

        frames = {camera: rows(values, batch.final_frames[camera]) for camera, values in batch.frames.items()}
        words = self.trained.words(batch.instruction)[own]
        words = torch.cat([words, words[:1].expand(padding, -1)])
        return frames, rows(batch.proprio, batch.final_proprio), words

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
