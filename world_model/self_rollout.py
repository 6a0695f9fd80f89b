"""Rows of training that go on from what the model has just painted.

A model that samples reads what it wrote; trained on recordings alone it has never seen that. So some rows of every
batch stay for the next one: their prediction becomes the newest frame of their context, until their recorded window
ends. That takes no forward pass beside the one that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from world_model.codec import Codec


class SelfRollout:
    """``r`` recorded windows of ``context + calls * chunk`` steps, and how far the model has painted over each."""

    def __init__(self, *, context: int, chunk: int, calls: int) -> None:
        """A window is asked ``calls`` times for a chunk before it is replaced."""
        self.context, self.chunk, self.calls = context, chunk, calls
        self.window: dict[str, Tensor] = {}
        """``frames [r, s+1, c, h, w]`` in the model's space, ``proprio [r, s+1, p]``, ``action [r, s, a]``,
        ``tokens [r, l]``."""
        self.at: Int[Tensor, " r"] = torch.zeros(0, dtype=torch.long)
        """Where the context of each begins."""

    def renew(self, recorded: Mapping[str, Tensor], first: Int[Tensor, " r"]) -> None:
        """Take over ``recorded`` windows where ours have ended; theirs begin at ``first``, before which is padding."""
        if not len(self.at):
            self.window = {name: values.clone() for name, values in recorded.items()}
            self.at = torch.maximum(first, torch.arange(len(first)) * self.calls // len(first) * self.chunk)
            return  # not all in step
        ended = self.ended
        for name, values in recorded.items():
            self.window[name] = self.window[name].to(values.device)  # may come from a checkpoint
            self.window[name][ended] = values[ended]
        self.at = torch.where(ended, first, self.at)

    @property
    def ended(self) -> Bool[Tensor, " r"]:
        """No whole chunk of the window is left."""
        return self.at > (self.calls - 1) * self.chunk

    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frames and proprio ``[r, context + chunk, …]`` and actions ``[r, context - 1 + chunk, a]``.

        The last ``chunk`` frames are recorded; context may be painted.
        """
        rows, steps = torch.arange(len(self.at))[:, None], self.at[:, None] + torch.arange(self.context + self.chunk)
        window = self.window
        return window["frames"][rows, steps], window["proprio"][rows, steps], window["action"][rows, steps[:, :-1]]

    @torch.no_grad()
    def paint(self, frames: Float[Tensor, "r k c h w"], proprio: Float[Tensor, "r k p"], codec: Codec) -> None:
        """Write what was predicted over what was recorded, and move on by a chunk."""
        rows = torch.arange(len(self.at))[:, None]
        steps = self.at[:, None] + self.context + torch.arange(self.chunk)
        window = self.window
        window["frames"][rows, steps] = codec.settle(frames.float()).to(window["frames"].dtype)
        window["proprio"][rows, steps] = proprio.to(window["proprio"].dtype)
        self.at = self.at + self.chunk

    def state_dict(self) -> dict[str, Any]:
        """Tensors only."""
        return {"at": self.at, **self.window}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the writer of ``state`` stood."""
        self.window = {name: values.clone() for name, values in state.items() if name != "at"}
        self.at = state["at"].clone()
