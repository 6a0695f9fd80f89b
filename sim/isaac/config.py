"""What ``env=isaac`` can be told. Both sides of the worker read it, so it knows only the standard library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

STAND_IN = "stand_in"
"""``assets``: shapes that this project makes, see ``sim.isaac.assets``."""


@dataclass(frozen=True, kw_only=True)
class IsaacConfig:
    """One task of Isaac Lab and how it is shown. ``sim.isaac.env`` checks it."""

    task: str
    """Its id, e.g. ``Isaac-Reach-Franka``; with or without the ``-v0`` of Isaac Lab 2."""
    instructions: Sequence[str]
    """Sentences that name the task; the seed picks one. Isaac Lab has none."""
    modules: Sequence[str] = ()
    """Imported first, in Isaac Lab's Python: what registers tasks of your own."""
    cameras: Sequence[str] = ()
    """Names of the scene's camera sensors, drawn at ``image_size``."""
    image_size: int = 64
    proprio: Sequence[str] = ("policy",)
    """Observation groups, or ``group.term`` of a manager-based task, side by side."""
    proprio_names: Sequence[str] | None = None
    """One for each number; null numbers them."""
    proprio_mean: Sequence[float] | None = None
    """What a policy subtracts; null is 0."""
    proprio_std: Sequence[float] | None = None
    """What a policy divides by; null is 1."""
    action_low: float = -1.0
    """The task's action (Isaac Lab's are without bounds) that a normalised -1 stands for; more is clipped."""
    action_high: float = 1.0
    action_names: Sequence[str] | None = None
    success: str | None = None
    """``term:<name>`` of the termination manager, or ``module:function`` from the task to bool ``[n]`` in Isaac Lab's
    Python. Null: never; that an episode terminated says nothing."""
    reward: str = "sparse"
    """``sparse``: 1 while it is a success, which ends the episode. ``task``: Isaac Lab's own."""
    expert: str | None = None
    """``module:function`` from the task to what to do, float32 ``[n, a]``, normalised."""
    max_episode_steps: int | None = None
    """Control steps until an episode is truncated; null: the task's own."""
    steps_after_success: int = 0
    """Control steps that a sparse episode goes on after its success: what success looks like, for a world model."""
    seeds: str = "episode"
    """``episode``: each row is reset by itself, under its seed. ``batch``: all rows at once, under one seed made of
    theirs: fast for thousands of rows, but an episode then depends on those that were reset with it."""
    device: str = "cpu"
    """Where it simulates: ``cpu`` or ``cuda:0``."""
    overrides: Sequence[str] = ()
    """Isaac Lab 3's own, e.g. ``physics=newton_mjwarp``."""
    assets: str = STAND_IN
    """``stand_in``, ``nvidia`` (Isaac Lab's default: its bucket), or a folder or address that has NVIDIA's layout."""
    embodiment: str = "isaac"
    perturbation: Any = None
    """What differs from nominal in every episode: a ``sim.perturbation.Perturbation``, or its factors by name."""
    randomise: Any = None
    """Ranges from which each episode's seed draws its perturbation, or their name."""
    hold_still: Sequence[float] | None = None
    """The action under which nothing is commanded, normalised ``[a]``: what there is before a late action arrives, and
    what ``gain`` counts from. Null: not known; the task then has neither ``latency`` nor ``gain``."""
    held_out_instructions: Sequence[str] = ()
    """Other sentences, which only a perturbed ``phrasing`` uses."""
    object_shift: str | None = None
    """``module:function`` that moves the objects of rows which were just reset: takes the task, rows (int ``[k]``) and
    metres (float32 ``[k, 2]``). Null: they cannot be moved."""
    still_camera: str | None = None
    """A camera that stands still in the world, and can be moved."""
