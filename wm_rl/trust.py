"""How far data is trusted, by where it came from and how unsure the world model was.

Objectives know log-ratios and advantages only. What else there is to know of a decision reaches the update here: as a
factor on the objective's width, and as a weight. docs/objective.md lists what was tried here and did not help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.types import Source, UserError


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Knobs of trust."""

    width_source: Mapping[str, float] = field(default_factory=dict)
    """Factor on the objective's width for a source, e.g. ``{imagined: 0.5}``; 1 where not named."""
    imagined_temperature: float = 2.0
    """Decisions weigh ``exp(−uncertainty / temperature)``; only imagined ones are uncertain."""

    def __post_init__(self) -> None:
        """Refuse what is no trust."""
        for name, factor in self.width_source.items():
            if name not in list(Source):
                raise UserError(f"trust.width_source names '{name}'; sources are {', '.join(Source)}")
            if not factor > 0:
                raise UserError(f"trust.width_source.{name} must be positive, got {factor}")
        if not self.imagined_temperature > 0:
            raise UserError(f"trust.imagined_temperature must be positive, got {self.imagined_temperature}")

    def width(self, origin: Int[Tensor, " n"]) -> Float[Tensor, "n 1 1"]:
        """Factor on the objective's width of each decision, whose source is the ``origin``-th of ``Source``."""
        factors = torch.tensor([self.width_source.get(source.value, 1.0) for source in Source], device=origin.device)
        return factors[origin][:, None, None]

    def widest(self) -> float:
        """Largest of these factors."""
        return max((1.0, *self.width_source.values()))

    def weight(self, uncertainty: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Weight of each decision."""
        return torch.exp(-uncertainty / self.imagined_temperature)
