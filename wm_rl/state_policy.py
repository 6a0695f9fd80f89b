"""A policy that reads the simulator's state instead of pictures: for experiments on objectives, not for robots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.types import Spec, Statistics
from wm_rl.policy import PolicyOutput, TokenPolicy


@dataclass(frozen=True, kw_only=True)
class StatePolicyConfig:
    """Size of the policy."""

    bins: int
    """Discrete values of each action dimension, evenly spaced over [-1, 1]."""
    width: int
    """Of the two hidden layers."""


class StatePolicy(TokenPolicy):
    """A perceptron with LayerNorm over ``proprio``, one action per decision, its value head on detached features."""

    def __init__(self, config: StatePolicyConfig, *, spec: Spec, statistics: Statistics, seed: int) -> None:
        """Build with weights drawn from ``seed`` alone."""
        super().__init__()
        self.config, self.spec, self.statistics = config, spec, statistics
        self.chunk, self.version = 1, 0
        width = config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(spec.proprio_dim, width), nn.ReLU(), nn.LayerNorm(width))
            tokens = nn.Linear(width, spec.action_dim * config.bins)
            nn.init.normal_(tokens.weight, std=0.01)
            self.policy_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), tokens)
            self.value_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width),
                                            nn.Linear(width, 1))
        self._register(config.bins)

    def forward(
        self, frames: Mapping[str, Tensor], proprio: Float[Tensor, "n p"], words: Int[Tensor, "n l"]
    ) -> PolicyOutput:
        """Logits and value; ``frames`` and ``words`` are not read."""
        features = self.encoder((proprio.to(self.bin_centres.dtype) - self.proprio_mean) / self.proprio_std)
        logits = rearrange(self.policy_head(features), "n (k a v) -> n k a v", k=1, v=self.config.bins)
        return PolicyOutput(logits=logits, value=self.value_head(features.detach())[:, 0])

    def words(self, instruction: Sequence[str]) -> Int[Tensor, "n l"]:
        """Nothing."""
        return torch.zeros(len(instruction), 0, dtype=torch.int64, device=self.bin_centres.device)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """None: all layers move alike."""
        return ()

    def value_parameters(self) -> Iterable[nn.Parameter]:
        """What only the value depends on."""
        return self.value_head.parameters()

    def blocks(self) -> Iterable[nn.Module]:
        """Its perceptrons."""
        return [self.encoder, self.policy_head]
