"""Open-loop rollouts of the video model: recorded context in, frames after frames out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from data.store import ReplayStore
from world_model.pipeline import WorldModelPipeline
from world_model.training import stack_cameras

CARRIED = 0.12
"""Share of a step's squared error that stays in every later frame: on Meta-World the error of the eighth open-loop step
was 1.36 times that of the first. 1 would be a random walk, 0 no drift."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What was recorded up to a step: ``t`` frames and proprio, and the ``t - 1`` actions between them."""

    frames: UInt8[Tensor, "t c h w"]
    proprio: Float[Tensor, "t p"]
    actions: Float[Tensor, "t1 a"]


def read_context(store: ReplayStore, episode: int, step: int, context: int) -> Context:
    """Read the ``context`` steps up to ``step``; before the beginning the first repeats with zero actions."""
    steps = np.arange(step - context + 1, step + 1)
    rows = np.maximum(steps, 0)
    frames = {
        camera: torch.from_numpy(store.column(episode, f"rgb_{camera}")[rows].copy()) for camera in store.spec.cameras
    }
    actions = store.column(episode, "action")[rows[:-1]] * (steps[:-1] >= 0)[:, None]
    return Context(
        frames=stack_cameras(frames, store.spec.cameras),
        proprio=torch.from_numpy(store.column(episode, "proprio")[rows].copy()),
        actions=torch.from_numpy(actions.astype(np.float32)),
    )


@dataclass(frozen=True, kw_only=True)
class Imagined:
    """``s`` imagined steps, the context not included."""

    frames: UInt8[Tensor, "b s c h w"]
    proprio: Float[Tensor, "b s p"]
    error: Float[Tensor, "b s"]
    """Expected error of each step over the typical one."""


def open_loop(
    pipeline: WorldModelPipeline,
    contexts: Sequence[Context],
    actions: Float[Tensor, "b s a"],
    instruction: Sequence[str],
    *,
    generator: torch.Generator,
    inference_steps: int,
) -> Imagined:
    """Imagine the outcome of ``actions``, feeding each prediction back as context."""
    frames = torch.stack([context.frames for context in contexts])
    proprio = torch.stack([context.proprio for context in contexts])
    past = torch.stack([context.actions for context in contexts])
    outputs = []
    for step in range(actions.shape[1]):
        taken = torch.cat([past, actions[:, step : step + 1]], dim=1)
        output = pipeline(
            frames,
            taken,
            proprio,
            instruction,
            generator,
            num_inference_steps=inference_steps,
        )
        outputs.append(output)
        frames = torch.cat([frames[:, 1:], output.frames[:, None].to(frames.device)], dim=1)
        proprio = torch.cat([proprio[:, 1:], output.proprio[:, None].to(proprio.device)], dim=1)
        past = taken[:, 1:]
    return Imagined(
        frames=torch.stack([output.frames for output in outputs], dim=1).cpu(),
        proprio=torch.stack([output.proprio for output in outputs], dim=1).cpu(),
        error=torch.stack([output.error for output in outputs], dim=1).cpu(),
    )


def accumulate(errors: Float[Tensor, "b s"]) -> Float[Tensor, " b"]:
    """Estimate the last frame's error from those of all steps: its own square plus a share of the others'."""
    squares = errors.square()
    return (squares[:, -1] + CARRIED * squares[:, :-1].sum(1)).sqrt()
