"""Figures that need no display and leave matplotlib's global state alone."""

from __future__ import annotations

import base64
import io
from typing import Any


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure of that many inches, and its axes (an array of them when there are several columns)."""
    from matplotlib.figure import Figure  # late: importing matplotlib takes half a second

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, columns)
    for each in figure.axes:
        for side in ("top", "right"):
            each.spines[side].set_visible(False)
    return figure, axes


def png(figure: Any) -> str:
    """The figure as a data URL."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return embed(buffer.getvalue(), "image/png")


def embed(content: bytes, kind: str) -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
