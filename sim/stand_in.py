"""The robot stand-in: a simulator that plays the part of the real robot.

Nobody's robot is in this repository. The stand-in has the same tasks and the same spec as the simulator, but other
dynamics, another camera pose, other light and one control step of action latency, so that what is learned from one
does not simply carry over to the other. Its recordings are written as robot logs and ingested as ``real`` data; every
trajectory's provenance says ``robot_stand_in``.
"""

from __future__ import annotations

import dataclasses

from sim.metaworld import MetaWorldConfig
from sim.perturbation import Perturbation

STAND_IN = Perturbation(
    gain=0.8,
    damping=1.3,
    friction=0.7,
    mass=1.1,
    latency=1,
    camera_shift=(0.05, -0.06, 0.05),
    zoom=1.06,
    light=(0.8, 0.72, 0.6),
)
"""Experts still solve the demo's tasks on it (docs/evaluate.md has the measured rates)."""


def stand_in_config(config: MetaWorldConfig | None = None, perturbation: Perturbation = STAND_IN) -> MetaWorldConfig:
    """``config`` as the stand-in plays it. Give it to ``VectorEnv`` with ``source="real"``."""
    return dataclasses.replace(MetaWorldConfig() if config is None else config, perturbation=perturbation)
