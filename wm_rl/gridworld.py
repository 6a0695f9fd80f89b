"""A 2 x 2 grid in which everything about an objective can be computed: no sampling, no approximation.

Start in one corner, absorbing goal in the opposite one, -1 per step, four moves that may bump into a wall, γ = 0.9.
Policies are tables of logits. A sample is a state from the *target's* discounted occupancy (without the goal) and an
action of the behaviour, so that plain importance sampling has no bias; a sample's gradient estimate is ``c A ∇ log π``
with the target's exact advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from wm_rl.objectives import Objective
from wm_rl.staleness import UTILISED

STATES, ACTIONS, GOAL, DISCOUNT = 4, 4, 3, 0.9
_MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))


def _transitions() -> Float[np.ndarray, "s a s"]:
    table = np.zeros((STATES, ACTIONS, STATES))
    for state in range(STATES):
        for action, (down, right) in enumerate(_MOVES):
            row, column = np.clip(state // 2 + down, 0, 1), np.clip(state % 2 + right, 0, 1)
            table[state, action, GOAL if state == GOAL else row * 2 + column] = 1
    return table


_TRANSITIONS = _transitions()
_REWARD = np.where(np.arange(STATES) == GOAL, 0.0, -1.0)


def softmax(logits: Float[np.ndarray, "s a"]) -> Float[np.ndarray, "s a"]:
    """Action probabilities."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def evaluate(policy: Float[np.ndarray, "s a"]) -> tuple[Float[np.ndarray, "s a"], Float[np.ndarray, " s"]]:
    """Exact advantages, and the share of each state that is not the goal in the discounted occupancy."""
    moves = np.einsum("sa,sat->st", policy, _TRANSITIONS)
    value = np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, _REWARD)
    advantage = _REWARD[:, None] + DISCOUNT * _TRANSITIONS @ value - value[:, None]
    occupancy = np.linalg.solve(np.eye(STATES) - DISCOUNT * moves.T, np.eye(STATES)[0])
    occupancy[GOAL] = 0
    return advantage, occupancy / occupancy.sum()


def path(steps: int, rate: float) -> list[Float[np.ndarray, "s a"]]:
    """Policies of exact gradient ascent from the uniform one: entry ``i`` has had ``i`` steps."""
    logits = np.zeros((STATES, ACTIONS))
    policies = [softmax(logits)]
    for _ in range(steps):
        advantage, share = evaluate(policies[-1])
        logits = logits + rate * share[:, None] * policies[-1] * advantage
        policies.append(softmax(logits))
    return policies


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What one objective makes of one pair of policies."""

    bias: float
    """Distance of the expected estimate from the true gradient."""
    variance: float
    """Of one sample's estimate, summed over coordinates."""
    cosine: float
    """Between the expected estimate and the true gradient; 0 for a zero estimate."""
    utilisation: float
    """Probability of a sample whose coefficient exceeds ``UTILISED``."""
    effective_share: float

    def mean_squared_error(self, batch: int) -> float:
        """Of the mean over ``batch`` samples."""
        return self.bias**2 + self.variance / batch


def analyse(
    objective: Objective, target: Float[np.ndarray, "s a"], behaviour: Float[np.ndarray, "s a"]
) -> Analysis:
    """Enumerate every state and action."""
    advantage, share = evaluate(target)
    probability = share[:, None] * behaviour
    log_ratio = torch.from_numpy(np.log(target / behaviour)).reshape(-1, 1, 1)
    signed = torch.from_numpy(advantage).reshape(-1, 1, 1)
    c = objective.coefficient(log_ratio, signed, torch.ones_like(signed)).double().numpy().reshape(target.shape)
    # ∂ log π(a|s) / ∂ logits(s, ·) = onehot(a) - π(·|s)
    score = np.eye(ACTIONS)[None] - target[:, None]
    estimates = (c * advantage)[..., None] * score
    expected = (probability[..., None] * estimates).sum(axis=1)
    true = share[:, None] * target * advantage
    length, other = np.linalg.norm(expected), np.linalg.norm(true)
    second = (probability * (estimates**2).sum(axis=2)).sum()
    mean, squares = (probability * c).sum(), (probability * c**2).sum()
    return Analysis(
        bias=float(np.linalg.norm(expected - true)), variance=float(max(second - length**2, 0)),
        cosine=float((expected * true).sum() / (length * other)) if length > 0 else 0.0,
        utilisation=float((probability * (c > UTILISED)).sum()),
        effective_share=float(mean**2 / squares) if squares > 0 else 0.0)


def divergence(target: Float[np.ndarray, "s a"], behaviour: Float[np.ndarray, "s a"]) -> float:
    """KL(behaviour ‖ target), over the target's states."""
    _, share = evaluate(target)
    return float((share[:, None] * behaviour * np.log(behaviour / target)).sum())


def random_pair(
    rng: np.random.Generator, distance: float
) -> tuple[Float[np.ndarray, "s a"], Float[np.ndarray, "s a"]]:
    """Target and behaviour whose logits differ by normal noise of deviation ``distance``, in no chosen direction."""
    logits = rng.normal(size=(STATES, ACTIONS))
    return softmax(logits), softmax(logits + distance * rng.normal(size=logits.shape))
