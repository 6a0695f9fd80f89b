"""Log-probs for what came without any: an importance ratio needs those of the policy that acted, and no log has them.

A clone that has learned the very steps which it is to label is too sure of them: it says 0.9 where whoever acted took
that action every second time. So the episodes are split in halves, and each half is labelled by a clone that learned
from the other one alone (cross-fitting, Chernozhukov et al. 2018, arXiv 1608.00060). One share held out instead would
calibrate the clone, but leave all other episodes labelled by a clone that knows them. What a clone says of the
half that it has not seen is then divided by a temperature: the one that was fitted to the *other* clone and half, so
that every figure of the report is measured on tokens that nothing was fitted to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
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
from wm_rl.cloning import CloningConfig, clone
from wm_rl.policy import TinyVLA
from wm_rl.seeding import derive

CHUNK_OF_ROWS = 256
"""Observations per forward pass: bounds memory."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How good the estimate is, on episodes that the estimating clone did not see. Log-likelihoods are nat per token.

    Tokens of steps after an episode was decided do not count.
    """

    tokens: int
    temperature: tuple[float, float]
    """By which the logits of each half's clone are divided."""
    log_likelihood: float
    log_likelihood_uncalibrated: float
    """The same clones at temperature 1."""
    log_likelihood_marginal: float
    """How often each bin was taken in that action dimension in the other half."""
    log_likelihood_uniform: float
    calibration_error: float
    """Expected calibration error of the likeliest token's probability (Guo et al. 2017)."""
    calibration_error_uncalibrated: float
    effective_share: float
    """Effective sample size over sample size of the importance ratios between the policy and this behaviour, per token:
    where the policy would begin to learn from these logs. The policy may have been cloned from them."""
    effective_share_decision: float
    """The same for the ratio of a whole decision, the product over its tokens."""

    def lines(self) -> list[str]:
        """For people."""
        first, second = self.temperature
        return [
            f"  held-out log-likelihood per token {self.log_likelihood:.3f} nat (uncalibrated "
            f"{self.log_likelihood_uncalibrated:.3f}, marginal {self.log_likelihood_marginal:.3f}, uniform "
            f"{self.log_likelihood_uniform:.3f}), temperatures {first:.2f} and {second:.2f}",
            f"  held-out calibration error {self.calibration_error:.3f} (uncalibrated "
            f"{self.calibration_error_uncalibrated:.3f}), {self.tokens} tokens",
            f"  effective sample size of the policy's importance ratios: {self.effective_share:.0%} of the tokens, "
            f"{self.effective_share_decision:.0%} of the decisions"]


@dataclass(frozen=True, kw_only=True)
class BehaviourReport:
    """What ``label_unknown_behaviour`` did."""

    labelled: int
    """Episodes that got log-probs."""
    calibration: Calibration | None
    """None where there was nothing to label, or a single episode, of which no part can be held out."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.labelled} episodes of unknown behaviour got log-probs from clones (tagged cloned)"]
        if self.calibration is not None:
            return lines + self.calibration.lines()
        return lines + (["  a single episode: nothing could be held out, its clone has seen what it labelled"]
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


def label_unknown_behaviour(
    policy: TinyVLA, store: ReplayStore, config: CloningConfig, *, seed: int,
    log: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> BehaviourReport:
    """Give every stored episode of unknown behaviour tokens, decisions and calibrated log-probs of a clone.

    Two clones of ``policy``'s shape are fitted as ``config`` says, on the halves of what no policy of ours acted;
    ``log`` hears of their steps as of one fit. ``policy`` itself is only what the effective sample size is about. The
    recorded data is not touched: the store keeps the labels beside it and tags the episodes ``cloned``. A decision is
    placed every ``policy.chunk`` steps.
    """
    store.seal()
    behaviours = store.episodes.behaviour
    unknown = np.flatnonzero(behaviours == Behaviour.UNKNOWN.value)
    if len(unknown) == 0:
        return BehaviourReport(labelled=0, calibration=None)
    foreign = np.flatnonzero(behaviours != Behaviour.LOGGED.value)
    if len(foreign) == 1:
        estimates = {int(foreign[0]): _estimate(policy, store, int(foreign[0]))}
        _commit(store, estimates, unknown, _hash(policy))
        return BehaviourReport(labelled=1, calibration=None)
    half = halves(store.episodes.source[foreign], seed)
    clones: list[TinyVLA] = []
    seen: dict[int, _Estimate] = {}
    for number in (0, 1):
        def log_half(step: int, metrics: dict[str, float], first: int = number * config.steps) -> None:
            log(first + step, metrics)

        unseen = foreign[half == number]
        clones.append(_clone_of(policy, store.only(foreign[half != number]), config, derive(seed, "half", number),
                                log_half))
        seen |= {episode: _estimate(clones[number], store, episode) for episode in unseen.tolist()}
    parts = [_Tokens.of([seen[episode] for episode in foreign[half == number].tolist()]) for number in (0, 1)]
    fitted = [fit_temperature(part.logits, part.token) for part in parts]
    temperature = (fitted[1], fitted[0])
    calibrated = {episode: seen[episode]._replace(logits=seen[episode].logits / temperature[number])
                  for number in (0, 1) for episode in foreign[half == number].tolist()}
    model = f"{_hash(clones[0])}/{temperature[0]:.4f} {_hash(clones[1])}/{temperature[1]:.4f}"
    _commit(store, calibrated, unknown, model)
    return BehaviourReport(labelled=len(unknown), calibration=_measure(policy, store, parts, temperature, calibrated))


def halves(source: np.ndarray, seed: int) -> np.ndarray:
    """0 or 1 for each episode ``[n]``: every source is dealt evenly, in an order drawn from ``seed``."""
    rng = np.random.default_rng(derive(seed, "halves"))
    half = np.empty(len(source), np.int64)
    dealt = 0
    for name in Source:
        own = rng.permutation(np.flatnonzero(source == name.value))
        half[own] = (dealt + np.arange(len(own))) % 2
        dealt += len(own)
    return half


def _clone_of(
    policy: TinyVLA, store: ReplayStore, config: CloningConfig, seed: int, log: Callable[[int, dict[str, float]], None]
) -> TinyVLA:
    """A clone of what ``store`` shows, of the sources that it has."""
    there = set(store.episodes.source.tolist())
    weights = {name: weight for name, weight in config.sources.items() if name in there and weight > 0}
    learned = TinyVLA(policy.config, spec=store.spec, statistics=store.statistics, seed=seed)
    clone(learned, store, dataclasses.replace(config, sources=weights or dict.fromkeys(sorted(there), 1.0)), seed=seed,
          device=policy.bin_centres.device, log=log)
    return learned.eval()


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


def _commit(store: ReplayStore, estimates: dict[int, _Estimate], unknown: np.ndarray, model: str) -> None:
    """Lay the estimates over the segments that hold an episode of unknown behaviour."""
    place, start, length = store.episodes.place, store.episodes.start, store.episodes.length
    for number in np.unique(place[unknown]).tolist():
        segment, dims = store.segments[number], store.spec.action_dim
        token = np.full((segment.rows, dims), UNKNOWN_TOKEN, np.int16)
        log_prob = np.full((segment.rows, dims), np.nan, np.float32)
        decision = np.zeros(segment.rows, bool)
        for episode in np.flatnonzero(place == number).tolist():
            if episode not in estimates:  # its behaviour is known: what stands here is not read
                continue
            estimate, rows = estimates[episode], slice(start[episode], start[episode] + length[episode])
            token[rows], decision[rows] = estimate.token.numpy(), estimate.decision.numpy()
            chosen = token_log_prob(estimate.logits.flatten(0, 1), estimate.token.flatten())
            log_prob[rows] = chosen.view(-1, dims).numpy()
        store.label_behaviour(segment.name, action_token=token, log_prob=log_prob, decision=decision, model=model)


class _Tokens(NamedTuple):
    """The tokens of some episodes that acted, in one row."""

    logits: Float[Tensor, "n v"]
    token: Int[Tensor, " n"]
    dimension: Int[Tensor, " n"]

    @staticmethod
    def of(estimates: Sequence[_Estimate]) -> _Tokens:
        dims = estimates[0].token.shape[1]
        token = torch.cat([each.token[each.acting] for each in estimates])
        return _Tokens(logits=torch.cat([each.logits[each.acting] for each in estimates]).flatten(0, 1),
                       token=token.flatten(), dimension=torch.arange(dims).repeat(len(token)))


def _measure(
    policy: TinyVLA, store: ReplayStore, parts: Sequence[_Tokens], temperature: tuple[float, float],
    calibrated: dict[int, _Estimate],
) -> Calibration:
    """``parts``: what each half's clone says of it, at temperature 1. ``calibrated``: the same by episode, divided."""
    raw, token = torch.cat([part.logits for part in parts]), torch.cat([part.token for part in parts])
    scaled = torch.cat([part.logits / by for part, by in zip(parts, temperature, strict=True)])
    bins = raw.shape[-1]
    marginal = [marginal_log_prob(other.token, other.dimension, own.token, own.dimension, bins=bins)
                for own, other in zip(parts, reversed(parts), strict=True)]
    ratios, joint = [], []
    for episode, behaviour in calibrated.items():
        own = _estimate(policy, store, episode)
        difference = own.logits.log_softmax(-1) - behaviour.logits.log_softmax(-1)
        ratio = difference.gather(-1, own.token[..., None])[..., 0][own.acting]
        ratios.append(ratio.flatten())
        joint += [chunk.sum() for chunk in ratio.split(policy.chunk)]
    return Calibration(
        tokens=len(token), temperature=temperature,
        log_likelihood=token_log_prob(scaled, token).mean().item(),
        log_likelihood_uncalibrated=token_log_prob(raw, token).mean().item(),
        log_likelihood_marginal=torch.cat(marginal).mean().item(), log_likelihood_uniform=-math.log(bins),
        calibration_error=expected_calibration_error(scaled, token),
        calibration_error_uncalibrated=expected_calibration_error(raw, token),
        effective_share=effective_sample_share(torch.cat(ratios)),
        effective_share_decision=effective_sample_share(torch.stack(joint)))


def _hash(policy: TinyVLA) -> str:
    return hashlib.sha256(serialise({k: v.contiguous() for k, v in policy.state_dict().items()})).hexdigest()[:16]
