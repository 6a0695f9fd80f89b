"""Log-probs for what came without any: an importance ratio needs those of the policy that acted, and no log has them.

A clone says what they may have been, and it is too sure: of steps that it learned, and often of others as well. So
whole episodes of what no policy of ours acted are held out from cloning (steps of one episode resemble each other), a
temperature is fitted to them, and all labels are the clone's at that temperature. The same episodes say how good
they are.

Cross-fitting (two clones, each labels the half that the other learned) would keep every label out of sample, and was
tried: with half the data a clone is so much worse that its labels are further from the truth (docs/pretrain.md).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as serialise
from torch import Tensor

from data.outcome import steps_until_decided
from data.store import ReplayStore
from data.types import UNKNOWN_TOKEN, Behaviour, Source
from wm_rl.calibration import (
    effective_sample_share,
    expected_calibration_error,
    fit_temperature,
    marginal_log_prob,
    token_log_prob,
)
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.seeding import derive

CHUNK_OF_ROWS = 256
"""Observations per forward pass: bounds memory."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How good the estimate is on the episodes held out. Log-likelihoods are nat per token.

    Tokens of steps after an episode was decided do not count. The temperature, one number, was fitted to these tokens.
    """

    episodes: int
    tokens: int
    temperature: float
    """By which the clone's logits are divided."""
    log_likelihood: float
    log_likelihood_uncalibrated: float
    """At temperature 1."""
    log_likelihood_marginal: float
    """How often each bin was taken in that action dimension, in the episodes not held out."""
    log_likelihood_uniform: float
    calibration_error: float
    """Expected calibration error of the likeliest token's probability (Guo et al. 2017)."""
    calibration_error_uncalibrated: float
    effective_share: float
    """Effective sample size over sample size of the importance ratios, per token, between the policy as it is now and
    this behaviour: how much of such logs the first update can use."""
    effective_share_decision: float
    """The same for the ratio of a whole decision, the product over its tokens."""

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"  {self.episodes} episodes held out ({self.tokens} tokens): log-likelihood per token "
            f"{self.log_likelihood:.3f} nat (temperature {self.temperature:.2f}; uncalibrated "
            f"{self.log_likelihood_uncalibrated:.3f}, marginal {self.log_likelihood_marginal:.3f}, uniform "
            f"{self.log_likelihood_uniform:.3f})",
            f"  calibration error {self.calibration_error:.3f} (uncalibrated {self.calibration_error_uncalibrated:.3f})"
            f"; effective sample of the importance ratios {self.effective_share:.0%} of the tokens, "
            f"{self.effective_share_decision:.0%} of the decisions"]


@dataclass(frozen=True, kw_only=True)
class BehaviourReport:
    """What ``label_unknown_behaviour`` did."""

    labelled: int
    """Episodes that got log-probs."""
    calibration: Calibration | None
    """None where there was nothing to label, or nothing was held out."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.labelled} episodes of unknown behaviour got log-probs from the clone (tagged cloned)"]
        if self.calibration is not None:
            return lines + self.calibration.lines()
        return lines + (["  nothing was held out: the clone is not calibrated, and too sure of what it learned"]
                        if self.labelled else [])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class _Estimate(NamedTuple):
    """What a clone says of one episode."""

    logits: Float[Tensor, "t a v"]
    token: Int[Tensor, "t a"]
    decision: Bool[Tensor, " t"]
    acting: Bool[Tensor, " t"]
    """Before the episode was decided."""


def hold_out(store: ReplayStore, share: float, seed: int) -> np.ndarray:
    """Indices of the episodes that the clone must not see, ascending: a share of each source's, drawn from ``seed``.

    Only episodes that no policy of ours acted; at least one of a source that has two, none of one that has one.
    """
    foreign = store.episodes.behaviour != Behaviour.LOGGED.value
    rng = np.random.default_rng(derive(seed, "hold out"))
    chosen = []
    for source in Source:
        own = np.flatnonzero(foreign & (store.episodes.source == source.value))
        count = max(1, round(share * len(own))) if share > 0 and len(own) > 1 else 0
        chosen.append(rng.permutation(own)[:count])
    return np.sort(np.concatenate(chosen))


def without(store: ReplayStore, held_out: np.ndarray) -> ReplayStore:
    """What the clone may learn from."""
    return store.only(np.setdiff1d(np.arange(len(store)), held_out))


def label_unknown_behaviour(policy: TinyVLA, store: ReplayStore, held_out: np.ndarray) -> BehaviourReport:
    """Give every stored episode of unknown behaviour tokens, decisions and log-probs of ``policy``, calibrated.

    ``held_out`` are the episodes that it did not learn from (``hold_out``). The recorded data is not touched: the
    store keeps the labels beside it and tags the episodes ``cloned``. A decision is placed every
    ``policy.chunk`` steps. Raises ``UserError`` when the policy was made for other data than the store's.
    """
    check_compatible(policy, spec=store.spec, statistics=store.statistics, what="replay store")
    store.seal()
    behaviours = store.episodes.behaviour
    unknown = np.flatnonzero(behaviours == Behaviour.UNKNOWN.value)
    if len(unknown) == 0:
        return BehaviourReport(labelled=0, calibration=None)
    unseen = [_estimate(policy, store, episode) for episode in held_out.tolist()]
    calibration = None
    if unseen:
        rest = np.setdiff1d(np.flatnonzero(behaviours != Behaviour.LOGGED.value), held_out)
        calibration = _measure(policy, unseen, [store.column(episode, "action")[:-1] for episode in rest.tolist()])
    _commit(policy, store, unknown, 1.0 if calibration is None else calibration.temperature)
    return BehaviourReport(labelled=len(unknown), calibration=calibration)


def _estimate(policy: TinyVLA, store: ReplayStore, index: int) -> _Estimate:
    """What ``policy`` would have said at every step of an episode, looking once per chunk."""
    trajectory = store.trajectory(index)
    steps, device = len(trajectory), policy.bin_centres.device
    token = policy.discretise(torch.from_numpy(trajectory.action).to(device)).cpu()
    starts = torch.arange(0, steps, policy.chunk)
    parts = []
    with torch.inference_mode():
        for rows in starts.split(CHUNK_OF_ROWS):
            frames = {camera: torch.from_numpy(values[rows.numpy()]).to(device)
                      for camera, values in trajectory.frames.items()}
            proprio = torch.from_numpy(trajectory.proprio[rows.numpy()]).to(device)
            words = policy.words([trajectory.instruction] * len(rows))
            parts.append(policy(frames, proprio, words).logits.float().cpu())
    acting = torch.arange(steps) < steps_until_decided(trajectory.terminated)
    return _Estimate(logits=torch.cat(parts).flatten(0, 1)[:steps], token=token,
                     decision=(torch.arange(steps) % policy.chunk == 0) & acting, acting=acting)


def _commit(policy: TinyVLA, store: ReplayStore, unknown: np.ndarray, temperature: float) -> None:
    """Lay the estimates over the segments that hold an episode of unknown behaviour."""
    place, start, length = store.episodes.place, store.episodes.start, store.episodes.length
    segments = list(store.segments)  # as ``place`` counts them: a label moves its segment to another place
    weights = {name: value.contiguous() for name, value in policy.state_dict().items()}
    model = f"{hashlib.sha256(serialise(weights)).hexdigest()[:16]} at temperature {temperature:.4f}"
    for number in np.unique(place[unknown]).tolist():
        segment, dims = segments[number], store.spec.action_dim
        token = np.full((segment.rows, dims), UNKNOWN_TOKEN, np.int16)  # stays where the behaviour is known
        log_prob = np.full((segment.rows, dims), np.nan, np.float32)
        decision = np.zeros(segment.rows, bool)
        for episode in unknown[place[unknown] == number].tolist():
            estimate, rows = _estimate(policy, store, episode), slice(start[episode], start[episode] + length[episode])
            token[rows], decision[rows] = estimate.token.numpy(), estimate.decision.numpy()
            chosen = token_log_prob(estimate.logits.flatten(0, 1) / temperature, estimate.token.flatten())
            log_prob[rows] = chosen.view(-1, dims).numpy()
        store.label_behaviour(segment.name, action_token=token, log_prob=log_prob, decision=decision, model=model)


def _measure(policy: TinyVLA, unseen: Sequence[_Estimate], seen_actions: Sequence[np.ndarray]) -> Calibration:
    """Fit the temperature and say what it gives. ``seen_actions``: ``[t, a]`` of each episode not held out."""
    dims = unseen[0].token.shape[1]
    token = torch.cat([each.token[each.acting] for each in unseen]).flatten()
    logits = torch.cat([each.logits[each.acting] for each in unseen]).flatten(0, 1)
    temperature = fit_temperature(logits, token)
    scaled, bins, dimension = logits / temperature, logits.shape[-1], torch.arange(dims).repeat(len(token) // dims)
    actions = torch.from_numpy(np.concatenate([*seen_actions, np.empty((0, dims), np.float32)]))
    seen = policy.discretise(actions.to(policy.bin_centres.device)).cpu().flatten()
    marginal = marginal_log_prob(seen, torch.arange(dims).repeat(len(actions)), token, dimension, bins=bins)
    own, behaviour = token_log_prob(logits, token), token_log_prob(scaled, token)
    steps = [int(each.acting.sum()) for each in unseen]
    decisions = [chunk.sum() for ratios in (own - behaviour).view(-1, dims).split(steps)
                 for chunk in ratios.split(policy.chunk)]
    return Calibration(
        episodes=len(unseen), tokens=len(token), temperature=temperature, log_likelihood=behaviour.mean().item(),
        log_likelihood_uncalibrated=own.mean().item(), log_likelihood_marginal=marginal.mean().item(),
        log_likelihood_uniform=-math.log(bins), calibration_error=expected_calibration_error(scaled, token),
        calibration_error_uncalibrated=expected_calibration_error(logits, token),
        effective_share=effective_sample_share(own - behaviour),
        effective_share_decision=effective_sample_share(torch.stack(decisions)))
