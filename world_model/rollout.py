"""Open-loop rollouts of the video model: recorded context in, frames after frames out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from data.outcome import steps_until_decided, success_frames, undecided_frames
from data.store import ReplayStore
from data.text import tokenize
from data.types import Success
from world_model.frames import stack_cameras
from world_model.pipeline import WorldModelPipeline

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
class Windows:
    """What was recorded from some steps on: contexts, and up to ``s`` steps after them."""

    contexts: Sequence[Context]
    instruction: Sequence[str]
    action: Float[Tensor, "b s a"]
    """Zero after the end of an episode."""
    frames: UInt8[Tensor, "b s c h w"]
    """After each action; the last one repeats after the end."""
    proprio: Float[Tensor, "b s p"]
    mask: Bool[Tensor, "b s"]
    """The step was recorded."""
    done: Bool[Tensor, "b s"]
    """The step's frame shows success."""
    known: Bool[Tensor, "b s"]
    """The step's frame shows success, or comes before any."""

    def tokens(self) -> Int[Tensor, "b l"]:
        """Words of the instructions."""
        return torch.tensor([tokenize(text) for text in self.instruction])


def read_windows(
    store: ReplayStore, places: Sequence[tuple[int, int]], *, context: int, horizon: int
) -> Windows:
    """Read the windows that begin at ``places`` (episode, step)."""
    spec, table = store.spec, store.episodes
    b = len(places)
    action = torch.zeros(b, horizon, spec.action_dim)
    proprio = torch.zeros(b, horizon, spec.proprio_dim)
    frames = torch.zeros(b, horizon, 3 * len(spec.cameras), spec.image_size, spec.image_size, dtype=torch.uint8)
    steps = torch.zeros(b, dtype=torch.long)
    done, known = torch.zeros(2, b, horizon, dtype=torch.bool)
    for i, (episode, start) in enumerate(places):
        length = int(table.length[episode])
        left = min(horizon, length - start)
        rows = start + 1 + np.minimum(np.arange(horizon), left - 1)
        action[i, :left] = torch.from_numpy(store.column(episode, "action")[start : start + left].copy())
        proprio[i] = torch.from_numpy(store.column(episode, "proprio")[rows].copy())
        seen = {c: torch.from_numpy(store.column(episode, f"rgb_{c}")[rows].copy()) for c in spec.cameras}
        frames[i] = stack_cameras(seen, spec.cameras)
        steps[i] = left
        shown, before = outcome(store, episode)
        done[i, :left] = torch.from_numpy(shown[start + 1 : start + 1 + left])
        known[i, :left] = torch.from_numpy((shown | before)[start + 1 : start + 1 + left])
    number = torch.arange(horizon)
    return Windows(
        contexts=[read_context(store, episode, start, context) for episode, start in places],
        instruction=[str(table.instruction[episode]) for episode, _ in places],
        action=action, frames=frames, proprio=proprio, mask=number < steps[:, None], done=done,
        known=known,
    )


def outcome(store: ReplayStore, episode: int) -> tuple[Bool[np.ndarray, " t1"], Bool[np.ndarray, " t1"]]:
    """Which frames of a stored episode show success, and which come before any: none where nobody knows."""
    terminated, reward = (store.column(episode, name)[:-1] for name in ("terminated", "reward"))
    success = store.episodes.success[episode]
    before = undecided_frames(terminated) & (success != Success.UNKNOWN.value)
    return success_frames(terminated, reward, succeeded=success == Success.YES.value), before


def decided_at(store: ReplayStore, episode: int) -> int:
    """Steps of a stored episode until it was decided."""
    return steps_until_decided(store.column(episode, "terminated")[:-1])


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
    outputs, chunk, steps = [], pipeline.denoiser.chunk, actions.shape[1]
    padded = torch.cat([actions, actions[:, -1:].expand(-1, -steps % chunk, -1)], dim=1)
    for step in range(0, steps, chunk):
        taken = torch.cat([past, padded[:, step : step + chunk]], dim=1)
        output = pipeline(frames, taken, proprio, instruction, generator, num_inference_steps=inference_steps)
        outputs.append(output)
        frames = torch.cat([frames[:, chunk:], output.frames.to(frames.device)], dim=1)[:, -frames.shape[1] :]
        proprio = torch.cat([proprio[:, chunk:], output.proprio.to(proprio.device)], dim=1)[:, -proprio.shape[1] :]
        past = taken[:, -past.shape[1] :]
    return Imagined(
        frames=torch.cat([output.frames for output in outputs], dim=1)[:, :steps].cpu(),
        proprio=torch.cat([output.proprio for output in outputs], dim=1)[:, :steps].cpu(),
        error=torch.cat([output.error for output in outputs], dim=1)[:, :steps].cpu(),
    )


@dataclass(frozen=True, kw_only=True)
class ImaginedFrames:
    """Open-loop rollouts of recorded actions: what the simulator or robot recorded labels what was imagined."""

    frames: UInt8[Tensor, "b s1 c h w"]
    """From the last context frame on."""
    proprio: Float[Tensor, "b s1 p"]
    tokens: Int[Tensor, "b l"]
    known: Bool[Tensor, "b s"]
    done: Bool[Tensor, "b s"]

    def pools(self) -> tuple[Int[Tensor, "n 2"], Int[Tensor, "m 2"]]:
        """Window and step of frames that show success, and of those that do not."""
        return self.done.nonzero(), (self.known & ~self.done).nonzero()


def imagine_windows(
    pipeline: WorldModelPipeline, windows: Windows, *, seed: int, inference_steps: int
) -> ImaginedFrames:
    """Roll the recorded actions of ``windows`` out in the model."""
    generator = torch.Generator().manual_seed(seed)
    imagined = open_loop(
        pipeline, windows.contexts, windows.action, windows.instruction, generator=generator,
        inference_steps=inference_steps)
    last = torch.stack([context.frames[-1] for context in windows.contexts])
    proprio = torch.stack([context.proprio[-1] for context in windows.contexts])
    return ImaginedFrames(
        frames=torch.cat([last[:, None], imagined.frames], 1),
        proprio=torch.cat([proprio[:, None], imagined.proprio], 1),
        tokens=windows.tokens(), known=windows.known, done=windows.done)


def accumulate(errors: Float[Tensor, "b s"]) -> Float[Tensor, " b"]:
    """Estimate the last frame's error from those of all steps: its own square plus a share of the others'."""
    squares = errors.square()
    return (squares[:, -1] + CARRIED * squares[:, :-1].sum(1)).sqrt()
