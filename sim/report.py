"""One self-contained HTML report: verdict, success, what was trained on what, curves, film strips, times."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
from jaxtyping import UInt8

from sim.figures import embed, new_figure, png
from sim.intervals import Interval
from sim.video import enlarge

SOURCE_COLOURS = {"sim": "#3b76c4", "real": "#d98324", "imagined": "#8a5bb5"}
BEFORE, AFTER = "#9aa5b1", "#1f7a5a"


@dataclass(frozen=True, kw_only=True)
class SuccessRow:
    """Success of one task, or of all of them, before and after training on the same seeds."""

    name: str
    mode: str
    """``sampled`` or ``greedy``."""
    trials: int
    before: Interval | None
    after: Interval
    difference: Interval | None
    """Paired by seed; None without a baseline."""


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """What the learner took from one source."""

    source: str
    """``sim``, ``real`` (say so where it is the stand-in) or ``imagined``."""
    episodes: int
    steps: int
    success_rate: float | None
    gradient_share: float
    """Share of the decisions that updates were computed from."""
    behaviour: str
    """E.g. ``logged`` or ``cloned``."""


@dataclass(frozen=True, kw_only=True)
class StalenessRow:
    """Samples by how many updates old the policy was that acted."""

    lag: str
    share: float
    mean_abs_log_ratio: float
    effective_sample_size: float
    """As a fraction of the samples in the bucket."""
    weight_above: float
    """Share of tokens whose trust weight is above 0.1."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training curve."""

    title: str
    x_label: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    """Name to ``(x, y)``."""


@dataclass(frozen=True, kw_only=True)
class FilmStrip:
    """The same actions in the recording and in imagination."""

    title: str
    real: UInt8[np.ndarray, "t h w 3"]
    imagined: UInt8[np.ndarray, "t h w 3"]


@dataclass(frozen=True, kw_only=True)
class PerturbedRow:
    """Success of one policy where one thing differs, on the trials of its evaluation."""

    name: str
    trials: int
    success: Interval
    difference: Interval
    """To the unperturbed trials, paired by task and seed."""
    frame: UInt8[np.ndarray, "h w 3"]
    """The first of one trial."""
    caption: str


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """All that a report shows. An empty section says so in the report; nothing is hidden."""

    title: str
    verdict: str
    """One or two sentences, shown first."""
    passed: bool | None
    """Colours the verdict: True green, False red, None grey (nothing to compare with)."""
    success: Sequence[SuccessRow] = ()
    perturbed: Sequence[PerturbedRow] = ()
    sources: Sequence[SourceRow] = ()
    staleness: Sequence[StalenessRow] = ()
    curves: Sequence[Curve] = ()
    strips: Sequence[FilmStrip] = ()
    videos: Mapping[str, Path] = field(default_factory=dict)
    """Caption to mp4 file; the file is embedded."""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    """What a reader must know to judge the numbers, e.g. that ``real`` is a robot stand-in."""
    config: str = ""
    """The composed configuration as YAML."""


def write_report(path: Path | str, data: ReportData) -> Path:
    """Write ``data`` as one HTML file with every figure and video inside; returns its path."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    page = environment.from_string((Path(__file__).parent / "report.html.j2").read_text(encoding="utf-8")).render(
        data=data,
        success_figure=_success_figure(data.success),
        source_figure=_source_figure(data.sources),
        curve_figures=[_curve_figure(curve) for curve in data.curves],
        strips=[(strip.title, _picture(_film(strip))) for strip in data.strips],
        perturbed_frames=[(row.caption, _picture(enlarge(row.frame, max(1, round(128 / len(row.frame))))))
                          for row in data.perturbed],
        videos={caption: embed(Path(file).read_bytes(), "video/mp4") for caption, file in data.videos.items()},
        colours=SOURCE_COLOURS,
    )
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


def _success_figure(rows: Sequence[SuccessRow]) -> str:
    """Dots with intervals: before and after, one line per task and mode."""
    if not rows:
        return ""
    figure, axes = new_figure(7.2, 0.8 + 0.42 * len(rows))
    for index, row in enumerate(rows):
        y = len(rows) - 1 - index
        marks = ((row.before, BEFORE, 0.13, "before"), (row.after, AFTER, -0.13, "after"))
        for interval, colour, offset, label in marks:
            if interval is not None:
                axes.plot([interval.low, interval.high], [y + offset] * 2, color=colour, linewidth=3, alpha=0.55,
                          solid_capstyle="round")
                axes.plot(interval.estimate, y + offset, "o", color=colour, markersize=7,
                          label=label if index == 0 else None)
    axes.set_yticks(range(len(rows)), [f"{row.name} · {row.mode}" for row in reversed(rows)])
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.6, len(rows) - 0.4), xlabel="success rate, 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return png(figure)


def _source_figure(rows: Sequence[SourceRow]) -> str:
    """One bar: the share of the gradient that each source gave."""
    if not rows:
        return ""
    figure, axes = new_figure(7.2, 1.1)
    left = 0.0
    for row in rows:
        share = row.gradient_share
        axes.barh(0, share, left=left, color=SOURCE_COLOURS.get(row.source.split()[0], "#777777"))
        if share > 0.06:
            axes.text(left + share / 2, 0, f"{row.source.split()[0]}\n{100 * share:.0f} %", ha="center", va="center",
                      color="white", fontsize=9)
        left += share
    axes.set_xlim(0, max(left, 1e-9))
    axes.axis("off")
    return png(figure)


def _curve_figure(curve: Curve) -> str:
    figure, axes = new_figure(3.5, 2.4)
    for name, (x, y) in curve.lines.items():
        axes.plot(x, y, label=name, linewidth=1.6, color=SOURCE_COLOURS.get(name))
    axes.set_title(curve.title, fontsize=10)
    axes.set_xlabel(curve.x_label, fontsize=9)
    axes.grid(alpha=0.3)
    if len(curve.lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _film(strip: FilmStrip, columns: int = 8) -> UInt8[np.ndarray, "H W 3"]:
    """Lay the recording above, imagination below, at most ``columns`` moments spread over the clip."""
    count = min(len(strip.real), len(strip.imagined))
    moments = np.unique(np.linspace(0, count - 1, min(columns, count)).round().astype(int))
    scale = max(1, round(96 / strip.real.shape[1]))
    rows = [np.concatenate(list(enlarge(clip[moments], scale)), axis=1) for clip in (strip.real, strip.imagined)]
    gap = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([rows[0], gap, rows[1]])


def _picture(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return embed(buffer.getvalue(), "image/png")
