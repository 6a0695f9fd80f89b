"""Episodes as mp4 and film strips: what the policy saw, enlarged, framed in a colour once the outcome is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.types import Success, Trajectory

COLOURS = {Success.YES: (40, 170, 70), Success.NO: (200, 50, 50), Success.UNKNOWN: (130, 130, 130)}
"""Border of the last second: green for success, red for failure, grey where nobody knows."""


def write_video(path: Path | str, episodes: Sequence[Trajectory], *, camera: str | None = None, scale: int = 4,
                fps: float = 15.0, columns: int = 4) -> None:
    """Write episodes side by side as one H.264 mp4 that browsers play.

    Args:
        path: The file to write.
        episodes: At least one; shorter ones hold their last frame, within the border that shows the outcome.
        camera: Which camera; the first one by default.
        scale: Each pixel becomes ``scale`` by ``scale``.
        fps: Control steps shown per second.
        columns: Episodes per row.

    """
    if not episodes:
        raise ValueError("a video needs at least one episode, got none")
    clips = [_marked(episode, camera or next(iter(episode.frames)), scale) for episode in episodes]
    length = max(len(clip) for clip in clips) + round(fps)
    write_frames(path, (grid([clip[min(i, len(clip) - 1)] for clip in clips], columns) for i in range(length)), fps=fps)


def write_film(path: Path | str, episodes: Sequence[Trajectory], *, camera: str | None = None, scale: int = 2,
               columns: int = 10) -> None:
    """Write a PNG with a row for each episode: ``columns`` moments from its first frame to its last, evenly spaced."""
    rows = []
    for episode in episodes:
        clip = _marked(episode, camera or next(iter(episode.frames)), scale)
        rows.append(np.concatenate(clip[np.linspace(0, len(clip) - 1, columns).round().astype(int)], axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def write_frames(path: Path | str, frames: Iterable[UInt8[np.ndarray, "h w 3"]], *, fps: float) -> None:
    """Encode RGB frames of one even size."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "23", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for index, frame in enumerate(frames):
            even = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2])
            if index == 0:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def grid(pictures: Sequence[UInt8[np.ndarray, "h w 3"]], columns: int) -> UInt8[np.ndarray, "H W 3"]:
    """Lay pictures of one size out in rows of ``columns``; missing ones are white."""
    columns = min(columns, len(pictures))
    blank = np.full_like(pictures[0], 255)
    padded = [*pictures, *[blank] * (-len(pictures) % columns)]
    return np.concatenate([np.concatenate(padded[i : i + columns], axis=1) for i in range(0, len(padded), columns)])


def enlarge(frames: UInt8[np.ndarray, "*t h w 3"], scale: int) -> UInt8[np.ndarray, "*t H W 3"]:
    """Repeat each pixel ``scale`` times in both directions."""
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _marked(episode: Trajectory, camera: str, scale: int) -> UInt8[np.ndarray, "t h w 3"]:
    """Enlarged frames with a border on the last one."""
    clip = enlarge(episode.frames[camera], scale)
    width = max(2, clip.shape[1] // 32)
    last = clip[-1].copy()
    inner = last[width:-width, width:-width].copy()
    last[:] = COLOURS[episode.success]
    last[width:-width, width:-width] = inner
    clip[-1] = last
    return clip
