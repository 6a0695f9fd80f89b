"""Frames as bytes and as pixels in [-1, 1]; several cameras stacked on the channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(frames: UInt8[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Bytes to [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_bytes(pixels: Float[Tensor, "*b"]) -> UInt8[Tensor, "*b"]:
    """[-1, 1] to bytes, rounded: what a context made of predictions is quantised to, as recorded frames are."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def stack_cameras(frames: Mapping[str, Tensor], cameras: tuple[str, ...]) -> Tensor:
    """``uint8 [..., h, w, 3]`` per camera to ``uint8 [..., c, h, w]``, cameras in the spec's order."""
    return torch.cat([frames[camera] for camera in cameras], dim=-1).movedim(-1, -3).contiguous()


def split_cameras(frames: Tensor, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Inverse of ``stack_cameras``, as NumPy copies."""
    last = frames.movedim(-3, -1).cpu()
    return {camera: last[..., 3 * i : 3 * i + 3].contiguous().numpy() for i, camera in enumerate(cameras)}
