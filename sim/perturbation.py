"""What differs from a nominal simulator: fixed for a whole environment, or drawn anew by each episode's seed.

One interface for training (``randomise``: ranges), evaluation (suites of fixed values, ``configs/perturbations``) and
the robot stand-in. A simulator says which factors it has; the others are refused by name.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from data.types import UserError

TEXTURES = ("usual", "plain", "checker")
"""Of the table: its own, one colour, or squares."""

PHRASINGS = ("usual", "held_out", "wordy")
"""Sentences of training; others for the same task; the latter within a longer request."""


@dataclass(frozen=True, kw_only=True)
class Perturbation:
    """The defaults change nothing. ``relative`` values multiply the nominal ones."""

    gain: float = 1.0
    """Hand displacement per unit of action, relative."""
    damping: float = 1.0
    """Joint damping, relative."""
    friction: float = 1.0
    """Sliding friction of everything, relative."""
    mass: float = 1.0
    """Mass and inertia of every body, relative."""
    latency: int = 0
    """Control steps between commanding an action and its execution; before the first arrives the hand holds still."""
    camera_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Metres added to the camera's position; its orientation stays."""
    camera_turn: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Degrees about the camera's own axes: up (looks up), left (looks left), roll (turns counter-clockwise)."""
    zoom: float = 1.0
    """Field of view, relative."""
    light: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Red, green and blue intensity of every light, relative."""
    light_turn: float = 0.0
    """Degrees by which the lights' directions lean over, towards positive y."""
    table_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Red, green and blue of what the objects stand on, relative."""
    table_texture: str = "usual"
    """One of ``TEXTURES``."""
    object_colour: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Red, green and blue of what is manipulated, and of what it is mounted on, relative."""
    object_shift: tuple[float, float] = (0.0, 0.0)
    """Metres (in a plane world: table lengths) by which objects begin elsewhere, x and y."""
    phrasing: str = "usual"
    """One of ``PHRASINGS``."""

    def __post_init__(self) -> None:
        for name, default in _NOMINAL.items():
            value = getattr(self, name)
            if isinstance(default, tuple):
                if isinstance(value, str | float | int) or len(value) != len(default):
                    raise UserError(f"perturbation {name} must be {len(default)} numbers, got {value!r}")
                object.__setattr__(self, name, tuple(value))
        for name in ("gain", "damping", "friction", "mass", "zoom"):
            if not getattr(self, name) > 0:
                raise UserError(f"perturbation {name} must be above 0, got {getattr(self, name)}")
        for name in ("light", "table_colour", "object_colour"):
            if min(getattr(self, name)) < 0:
                raise UserError(f"perturbation {name} must be 0 or more, got {list(getattr(self, name))}")
        if self.latency < 0:
            raise UserError(f"perturbation latency must be 0 or more control steps, got {self.latency}")
        for name, known in (("table_texture", TEXTURES), ("phrasing", PHRASINGS)):
            if getattr(self, name) not in known:
                raise UserError(f"perturbation {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    @property
    def changes(self) -> dict[str, Any]:
        """The factors that are not nominal, with their values."""
        return {name: getattr(self, name) for name, default in _NOMINAL.items() if getattr(self, name) != default}


_NOMINAL: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Perturbation)}

FACTORS = frozenset(_NOMINAL)
"""Names of all factors."""

Ranges = Mapping[str, Sequence[float]]
"""Lowest and highest value of each factor that varies; of several numbers each is drawn by itself."""

RANGES: Mapping[str, Ranges] = {"mild": {
    "light": (0.7, 1.2), "light_turn": (-15.0, 15.0), "camera_shift": (-0.03, 0.03), "camera_turn": (-2.0, 2.0),
    "table_colour": (0.7, 1.0), "object_colour": (0.7, 1.0), "friction": (0.8, 1.25), "mass": (0.8, 1.25),
    "damping": (0.8, 1.25)}}
"""Ranges with a name: what ``randomise`` may be instead of a mapping; of them a simulator takes what it has."""


def fixed(perturbation: Perturbation | Mapping[str, Any] | None, factors: Collection[str], *,
          simulator: str) -> Perturbation:
    """A perturbation, or its factors by name. UserError for one that ``simulator`` lacks."""
    given = perturbation.changes if isinstance(perturbation, Perturbation) else perturbation or {}
    check_factors(given, factors, simulator=simulator)
    return Perturbation(**given)


def ranges(randomise: str | Ranges | None, factors: Collection[str], *,
           simulator: str) -> dict[str, tuple[float, float]]:
    """Check ``randomise`` and return the ranges that apply.

    Raises:
        UserError: for a name that is not in ``RANGES``, a factor that is not a number, is unknown or that the simulator
            lacks, or a range that is not one.

    """
    if isinstance(randomise, str):
        if randomise not in RANGES:
            raise UserError(f"randomise must be one of {', '.join(RANGES)}, or ranges of factors, got {randomise!r}")
        randomise = {name: pair for name, pair in RANGES[randomise].items() if name in factors}
    randomise = randomise or {}
    check_factors(randomise, factors, simulator=simulator)
    for name, pair in randomise.items():
        if isinstance(_NOMINAL[name], str):
            raise UserError(f"randomise {name}: it is no number; drop it")
        if len(pair) != 2 or not pair[0] <= pair[1]:
            raise UserError(f"randomise {name}: expected [lowest, highest], got {list(pair)}")
        for bound in pair:
            Perturbation(**{name: _fill(name, [bound] * np.size(_NOMINAL[name]))})
    return {name: (pair[0], pair[1]) for name, pair in randomise.items()}


def check_factors(names: Collection[str], factors: Collection[str], *, simulator: str) -> None:
    """Raise UserError for the first of ``names`` that is not among the ``factors`` of ``simulator``."""
    for name in names:
        if name not in factors:
            known = "is not known" if name not in FACTORS else f"does not exist in {simulator}"
            raise UserError(f"perturbation {name} {known}; it has {', '.join(sorted(factors))}")


def draw(usual: Perturbation, varied: Ranges, seed: int) -> Perturbation:
    """``usual``, with each factor of ``varied`` drawn uniformly by ``seed`` and its name alone."""
    drawn = {}
    for name, (low, high) in varied.items():
        random = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(f"randomise {name}".encode())]))
        count = np.size(_NOMINAL[name])
        whole = isinstance(_NOMINAL[name], int)
        values = random.integers(int(low), int(high) + 1, count) if whole else random.uniform(low, high, count)
        drawn[name] = _fill(name, values.tolist())
    return dataclasses.replace(usual, **drawn) if drawn else usual


def _fill(name: str, values: list[float]) -> Any:
    return tuple(values) if isinstance(_NOMINAL[name], tuple) else values[0]


@runtime_checkable
class Perturbable(Protocol):
    """An Env that can be perturbed."""

    factors: Collection[str]
    """What it has."""

    @property
    def perturbation(self) -> Perturbation:
        """What differs in episodes that are reset now."""
        ...

    def perturb(self, perturbation: Perturbation) -> None:
        """Play every episode that is reset from now on under ``perturbation``. UserError for a factor it lacks."""
        ...
