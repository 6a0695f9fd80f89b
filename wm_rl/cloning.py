"""Behaviour cloning: a warm start for the policy, and log-probs for logs that came without any."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save as serialise
from torch.nn import functional

from data.outcome import steps_until_decided
from data.sampler import StepSampler
from data.store import ReplayStore
from data.types import Behaviour, UserError, to_torch
from wm_rl.policy import TinyVLA, check_compatible

CHUNK_OF_ROWS = 256
"""Observations per forward pass when a store is labelled: bounds memory."""


@dataclass(frozen=True, kw_only=True)
class CloningConfig:
    """Knobs of behaviour cloning."""

    steps: int
    batch: int
    learning_rate: float
    sources: Mapping[str, float]
    """Share of each source in a batch."""

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        if self.steps < 1 or self.batch < 1:
            raise UserError(f"cloning needs at least one step and one row, got steps={self.steps} batch={self.batch}")


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


def label_unknown_behaviour(policy: TinyVLA, store: ReplayStore) -> int:
    """Give every stored episode of unknown behaviour tokens, decisions and log-probs under ``policy``.

    The recorded data is not touched: the store keeps the labels beside it and tags the episodes ``cloned``. A decision
    is placed every ``policy.chunk`` steps. Returns the number of episodes labelled. Raises ``UserError`` when the
    policy was made for other data than the store's.
    """
    check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
    store.seal()
    model = hashlib.sha256(serialise({k: v.contiguous() for k, v in policy.state_dict().items()})).hexdigest()[:16]
    behaviours = np.asarray(store.episodes.behaviour).astype(str)
    segments = np.asarray(store.episodes.segment)
    labelled = 0
    for segment in dict.fromkeys(segments[behaviours == Behaviour.UNKNOWN].tolist()):
        episodes = np.flatnonzero(segments == segment)
        columns = [_label(policy, store, int(episode)) for episode in episodes]
        tokens, log_probs, decisions = (np.concatenate(column) for column in zip(*columns, strict=True))
        store.label_behaviour(segment, action_token=tokens, log_prob=log_probs, decision=decisions, model=model)
        labelled += int((behaviours[episodes] == Behaviour.UNKNOWN).sum())
    return labelled


def _label(policy: TinyVLA, store: ReplayStore, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one episode as stored (one more than its steps): tokens, log-probs, decisions."""
    trajectory = store.trajectory(index)
    steps, device = len(trajectory), policy.bin_centres.device
    token = policy.discretise(torch.from_numpy(np.ascontiguousarray(trajectory.action)).to(device))
    starts = torch.arange(0, steps, policy.chunk)
    log_prob = torch.zeros(token.shape, dtype=torch.float32)
    with torch.inference_mode():
        for rows in starts.split(CHUNK_OF_ROWS):
            frames = {camera: torch.from_numpy(np.ascontiguousarray(values[rows.numpy()])).to(device)
                      for camera, values in trajectory.frames.items()}
            proprio = torch.from_numpy(np.ascontiguousarray(trajectory.proprio[rows.numpy()])).to(device)
            words = policy.words([trajectory.instruction] * len(rows))
            log_probs = policy(frames, proprio, words).logits.float().log_softmax(dim=-1)
            for i in range(policy.chunk):
                here = rows + i < steps
                at = (rows + i)[here]
                chosen = token[at][..., None]
                log_prob[at] = log_probs[here, i].gather(-1, chosen)[..., 0].cpu()
    decision = (np.arange(steps) % policy.chunk == 0) & (
        np.arange(steps) < steps_until_decided(trajectory.terminated))
    last = np.full((1, token.shape[1]), -1, np.int16)
    return (np.concatenate([token.cpu().numpy().astype(np.int16), last]),
            np.concatenate([log_prob.numpy(), np.full((1, token.shape[1]), np.nan, np.float32)]),
            np.concatenate([decision, [False]]))
