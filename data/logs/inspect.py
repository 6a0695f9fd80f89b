"""What is in a log: streams, rates, gaps, clocks, problems, a contact sheet, and a mapping to start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.table import Table

from data.logs.mapping import CLOCKS, Camera, LogMapping, Part, to_yaml
from data.logs.readers import find_logs, open_log
from data.logs.streams import Kind, LogEpisode, Refused, Stream
from data.logs.sync import gaps
from data.types import UserError

SHEET_PICTURES, SHEET_SIZE = 8, 120
ACTION_WORDS = ("action", "command", "cmd", "target", "desired", "ctrl")
COMMON_WORDS = ("image", "images", "image_raw", "image_rect", "image_color", "compressed", "color", "rgb", "obs",
                "data")
IGNORED_WORDS = ("reward", "done", "termin", "truncat", "discount", "is_first", "is_last", "success", "timestamp")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The first usable episode of each log below a folder, and what could not be used."""

    episodes: Sequence[tuple[str, LogEpisode]]
    """Name of the log and its format, and the episode."""
    refused: Sequence[Refused]

    def tables(self) -> list[Table]:
        """One per log."""
        return [_table(title, episode) for title, episode in self.episodes]


def inspect(source: Path, family: str | None = None) -> Inspection:
    """Look at the first episode of every log. Raises ``UserError`` when there is no log."""
    episodes, refused = [], []
    for name, path in find_logs(source, family):
        log = open_log(name, path)
        for episode in log.episodes():
            if isinstance(episode, Refused):
                refused.append(episode)
                continue
            episodes.append((f"{path.name} ({log.format}): {episode.name}", episode))
            break
    return Inspection(episodes=episodes, refused=refused)


def propose(episode: LogEpisode) -> LogMapping:
    """A mapping to start from, guessed by names: check every line of it.

    Commands are what is called action, command, target and the like; other vectors are proprio. The clock is the best
    that all of them have; the rate that of the slowest camera, or of the commands. Raises ``UserError`` for an episode
    without vectors to take for state and command.
    """
    vectors = [s for s in episode.streams.values() if s.kind is Kind.VECTOR and len(s) > 1
               and not any(word in s.name.lower() for word in IGNORED_WORDS)]
    if not vectors:
        raise UserError(f"{episode.name} has no vectors to take for state and command, so no mapping is proposed")
    action = [s for s in vectors if any(word in s.name.lower() for word in ACTION_WORDS)] or vectors[-1:]
    proprio = [s for s in vectors if s not in action] or vectors[:1]
    cameras = [s for s in episode.streams.values() if s.kind is Kind.IMAGE and len(s) > 1]
    success = next((s.name for s in episode.streams.values() if s.kind is Kind.VECTOR and "success" in s.name.lower()),
                   None)
    used = [*proprio, *action, *cameras]
    clock = next((c for c in CLOCKS if all(c in s.clocks for s in used)), "log")
    paced = cameras or action
    rate = min((rate_of(s, clock) for s in paced), default=1.0)
    return LogMapping(
        proprio=tuple(Part(stream=s.name) for s in proprio), action=tuple(Part(stream=s.name) for s in action),
        cameras={_word(s.name, [c.name for c in cameras]): Camera(stream=s.name) for s in cameras}, clock=clock,
        success=success, rate=rate, max_gap=round(5 / rate, 3) if rate else 0.5)


def rate_of(stream: Stream, clock: str) -> float:
    """Messages per second, by the median gap; 1 for fewer than two stamps.

    A rate near a third of a whole number is one: a rounded rate would drift away from its own messages.
    """
    steps = gaps(stream.clocks[clock]) if clock in stream.clocks else np.zeros(0)
    typical = float(np.median(steps)) if len(steps) else 0.0
    if not typical > 0:
        return 1.0
    near = float(Fraction(1 / typical).limit_denominator(3))
    return near if abs(near * typical - 1) < 1e-3 else 1 / typical


def write_mapping(path: Path, mapping: LogMapping) -> None:
    """Write the YAML with a line that says what to check.

    Raises ``UserError`` when the file exists: it may have been corrected by hand since.
    """
    if path.exists():
        raise UserError(f"{path} is there already, perhaps corrected by hand; type hydra.run.dir=<another folder>")
    path.write_text("# A guess by names. Check streams, clock, rate, which stream was commanded, grippers, rotations.\n"
                    + to_yaml(mapping))


def contact_sheet(episode: LogEpisode) -> Image.Image | None:
    """Pictures of every camera, evenly over the episode, a row per camera; None where none can be decoded."""
    rows = []
    for stream in episode.streams.values():
        if stream.kind is not Kind.IMAGE or stream.pictures is None or not len(stream):
            continue
        row = Image.new("RGB", (SHEET_PICTURES * SHEET_SIZE, SHEET_SIZE + 14), "white")
        ImageDraw.Draw(row).text((2, 1), stream.name, fill="black")
        chosen = np.linspace(0, len(stream) - 1, SHEET_PICTURES).round().astype(int)
        try:
            for i, picture in enumerate(stream.pictures(chosen.tolist())):
                row.paste(Image.fromarray(picture).resize((SHEET_SIZE, SHEET_SIZE)), (i * SHEET_SIZE, 14))
        except ValueError as reason:
            ImageDraw.Draw(row).text((2, 30), str(reason)[:150], fill="red")
        rows.append(row)
    if not rows:
        return None
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * rows[0].height))
    return sheet


def _table(title: str, episode: LogEpisode) -> Table:
    table = Table("stream", "kind", "messages", "clocks", "Hz", "longest gap, s", "dimensions", title=title,
                  caption=_caption(episode))
    for stream in episode.streams.values():
        clock = next((c for c in CLOCKS if c in stream.clocks), None)
        steps = gaps(stream.clocks[clock]) if clock else np.zeros(0)
        backwards = int((np.diff(stream.clocks[clock]) < 0).sum()) if clock else 0
        table.add_row(stream.name, stream.kind.value, str(len(stream)), ", ".join(stream.clocks),
                      f"{rate_of(stream, clock):.4g}" if clock and len(steps) else "-",
                      (f"{steps.max():.3g}" if len(steps) else "-") + (f", {backwards} backwards" if backwards else ""),
                      _dimensions(stream))
    return table


def _dimensions(stream: Stream) -> str:
    if stream.values is None:
        return "x".join(map(str, stream.size)) if stream.size else stream.schema
    bad = int((~np.isfinite(stream.values)).any(1).sum())
    shown = ", ".join(stream.names) if stream.names else f"{stream.values.shape[1]} without names"
    return (shown if len(shown) <= 60 else shown[:57] + "...") + (f"; {bad} rows not finite" if bad else "")


def _caption(episode: LogEpisode) -> str:
    lines = [f"success: {episode.success.value} ({episode.success_from})"]
    lines += [f"instruction: {episode.instruction}"] if episode.instruction else []
    lines += [] if episode.whole else ["the recording was cut; salvaged up to there"]
    return "\n".join([*lines, *episode.problems])


def _word(name: str, others: Sequence[str]) -> str:
    """A short name for a camera that no other has: the end of its path, without what every camera is called."""
    def end(of: str, size: int) -> str:
        parts = [part for part in of.replace(".", "/").split("/") if part]
        return "_".join(([part for part in parts if part not in COMMON_WORDS] or parts)[-size:])

    for size in range(1, len(name) + 1):
        if [end(other, size) for other in others].count(end(name, size)) == 1:
            return end(name, size)
    return name.strip("/").replace("/", "_")
