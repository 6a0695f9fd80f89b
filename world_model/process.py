"""How a frame is noised, what the network sees of it, and how its answer is read: one class per objective.

``sigma`` is the objective's own noise level: EDM's standard deviation, or flow's time in [0, 1]. Everything is per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from torch import Tensor

Scheduler = EDMEulerScheduler | FlowMatchEulerDiscreteScheduler

OBJECTIVES = ("edm", "flow", "regression")
"""``regression`` is no noise process: the same network, asked once, without noise."""

SMALLEST_TIME = 0.02
"""Flow's times are kept above this in training, where its weight ``1 / t²`` would explode."""


class Scales(NamedTuple):
    """``frame = skip · noisy + out · network(in_ · noisy, noise)``."""

    skip: Float[Tensor, " b"]
    out: Float[Tensor, " b"]
    in_: Float[Tensor, " b"]
    noise: Float[Tensor, " b"]
    """What the network's time embedding is told, of order 1."""


class Process(Protocol):
    """A noise process."""

    def start(self, rows: int) -> Float[Tensor, " b"]:
        """Level that sampling starts from."""
        ...

    def levels(self, normal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Training levels from standard normal draws."""
        ...

    def mix(
        self, frame: Float[Tensor, b *d], noise: Float[Tensor, b *d], sigma: Float[Tensor, b *one]
    ) -> Float[Tensor, b *d]:
        """Noised frame; ``sigma`` broadcasts against it."""
        ...

    def scales(self, sigma: Float[Tensor, " b"]) -> Scales:
        """Preconditioning."""
        ...

    def weight(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Factor on the squared error of the frame that makes the network's own target of unit size."""
        ...

    def scheduler(self) -> Scheduler:
        """The diffusers scheduler that samples it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Edm:
    """Karras et al. 2022 (arXiv 2206.00364), table 1: ``noisy = frame + σ noise``, log-normal σ."""

    sigma_data: float = 0.5
    """Deviation of pixels in [-1, 1]."""
    sigma_max: float = 20.0
    log_mean: float = -0.4
    log_std: float = 1.2

    def start(self, rows: int) -> Float[Tensor, " b"]:
        """``sigma_max``."""
        return torch.full((rows,), self.sigma_max)

    def levels(self, normal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Log-normal."""
        return torch.exp(self.log_mean + self.log_std * normal)

    def mix(
        self, frame: Float[Tensor, b *d], noise: Float[Tensor, b *d], sigma: Float[Tensor, b *one]
    ) -> Float[Tensor, b *d]:
        """Variance grows."""
        return frame + sigma * noise

    def scales(self, sigma: Float[Tensor, " b"]) -> Scales:
        """``c_skip, c_out, c_in, c_noise``; the same as ``EDMEulerScheduler``'s."""
        total = sigma**2 + self.sigma_data**2
        return Scales(self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(),
                      0.25 * sigma.log())

    def weight(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """``1 / c_out²``."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2

    def scheduler(self) -> Scheduler:
        """Euler steps from ``sigma_max``."""
        return EDMEulerScheduler(sigma_max=self.sigma_max, sigma_data=self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): ``noisy = (1 − t) frame + t noise``, logit-normal t.

    Preconditioned as EDM is, for a frame of deviation ``sigma_data``: the network's target has unit size at every time,
    and at ``t = 1``, where nothing of the frame is left, it is the frame itself and not the velocity, from which the
    noise would have to be subtracted exactly.
    """

    sigma_data: float = 0.5
    """Deviation of pixels in [-1, 1]."""

    def start(self, rows: int) -> Float[Tensor, " b"]:
        """``t = 1``."""
        return torch.ones(rows)

    def levels(self, normal: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Logit-normal (Esser et al. 2024, arXiv 2403.03206, eq. 19)."""
        return normal.sigmoid().clamp(min=SMALLEST_TIME)

    def mix(
        self, frame: Float[Tensor, b *d], noise: Float[Tensor, b *d], sigma: Float[Tensor, b *one]
    ) -> Float[Tensor, b *d]:
        """Straight line."""
        return (1 - sigma) * frame + sigma * noise

    def scales(self, sigma: Float[Tensor, " b"]) -> Scales:
        """EDM's argument (its appendix B.6) for this path."""
        signal = (1 - sigma) * self.sigma_data
        total = signal**2 + sigma**2
        return Scales(signal * self.sigma_data / total, sigma * self.sigma_data / total.sqrt(), 1 / total.sqrt(),
                      2 * sigma - 1)

    def weight(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """``1 / out²``."""
        return 1 / self.scales(sigma).out ** 2

    def scheduler(self) -> Scheduler:
        """Euler steps from 1 to 0."""
        return FlowMatchEulerDiscreteScheduler()
