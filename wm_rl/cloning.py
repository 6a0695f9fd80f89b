"""Behaviour cloning: a warm start for the policy; ``wm_rl.behaviour`` estimates the behaviour of logs with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn import functional

from data.batches import to_torch
from data.sampler import StepSampler
from data.store import ReplayStore
from data.types import UserError
from wm_rl.policy import TinyVLA, check_compatible


@dataclass(frozen=True, kw_only=True)
class CloningConfig:
    """Knobs of behaviour cloning."""

    steps: int
    batch: int
    learning_rate: float
    sources: Mapping[str, float]
    """Share of each source in a batch."""
    held_out: float = 0.15
    """Share of the episodes that no policy of ours acted which is not learned, but calibrates (``wm_rl.behaviour``)."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"cloning needs at least one step and one row, got steps={self.steps} batch={self.batch}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"cloning.held_out: expected a share in [0, 1), got {self.held_out}; try "
                            "cloning.held_out=0.15")


def clone(
    policy: TinyVLA, store: ReplayStore, config: CloningConfig, *, seed: int, device: torch.device,
    log: Callable[[int, dict[str, float]], None],
) -> None:
    """Maximise the likelihood of the stored actions' tokens, in place. One-cycle learning rate, Adam.

    Raises ``UserError`` when the policy was made for other data than the store's.
    """
    check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
    sampler = StepSampler(store, sources=dict(config.sources), context=1, horizon=policy.chunk, seed=seed)
    policy.to(device).train()
    learned = list(policy.parameters())
    optimizer = torch.optim.Adam(learned, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=config.learning_rate, total_steps=config.steps + 1, pct_start=0.1)
    for step in range(config.steps):
        batch = to_torch(sampler.sample(step, config.batch), device)
        output = policy({camera: frames[:, 0] for camera, frames in batch.frames.items()},
                        batch.proprio[:, 0], policy.words(batch.instruction))
        token = policy.discretise(batch.action)
        loss_per_token = functional.cross_entropy(
            rearrange(output.logits, "b k a v -> b v k a"), token, reduction="none")
        acting = batch.mask & ~batch.aftermath
        real = acting[:, :, None].expand_as(loss_per_token)
        loss = (loss_per_token * real).sum() / real.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        log(step, {"loss": loss.item(),
                   "accuracy": ((output.logits.argmax(-1) == token) * real).sum().item() / real.sum().item()})
