"""A log's episode under a mapping: rows at the control rate, cut where nothing current was known."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from data.logs.mapping import ROTATIONS, LogMapping, Part, Segments
from data.logs.streams import Kind, LogEpisode, Stream
from data.logs.sync import grid, hold, linear, runs
from data.types import Success, UserError

_MOST_ROWS = 2e7
"""Of an episode: a week at 30 Hz. A damaged stamp may span centuries."""
_INSTANT = 1e-6
"""Seconds before the next marker at which a segment is over."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """``r`` rows without a hole, each an observation and the action commanded then."""

    name: str
    """Of the episode and, where it was cut, the part: ``run.mcap#2``."""
    time: Float64[np.ndarray, " r"]
    """Seconds on the mapping's clock."""
    proprio: Float32[np.ndarray, "r p"]
    action: Float32[np.ndarray, "r a"]
    """In the units of the store, not normalised."""
    picture: Mapping[str, Int64[np.ndarray, " r"]]
    """Number of each camera's message."""
    oldest: float
    """Age of the oldest message that was used, in s."""
    instruction: str
    task: str
    """Name of the task; empty where only a sentence says what it is."""
    success: Success
    success_from: str
    shows_success: Bool[np.ndarray, " r"]
    """The task is done in this row, where a stream says so of a success; else false throughout."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What became of an episode."""

    rows: Sequence[Rows]
    masked: int
    """Rows that were left out: a message too old, or a value that is not finite."""
    reasons: Mapping[str, int]
    """Why, with the rows of each."""


@dataclass(frozen=True, kw_only=True)
class _Segment:
    first: float
    last: float
    instruction: str | None = None
    success: Success | None = None
    ends: bool = False
    """It ends where the episode does, so that the episode's outcome is its own."""


def dimension_names(parts: Sequence[Part], streams: Mapping[str, Stream]) -> tuple[str, ...]:
    """What the store calls the dimensions. Raises ``UserError`` when two have one name, or the log's do not fit."""
    names = tuple(name for part in parts for name in _names(part, _find(part.stream, streams)))
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"dimensions need names of their own, {', '.join(twice)} come twice; give names in the mapping")
    return names


def sample(episode: LogEpisode, mapping: LogMapping, *, folder: Path | None = None) -> Sampled:
    """Read the mapped streams at the control rate.

    A row is kept where every stream has a message that is not from the future and at most ``max_gap`` old, and all
    values are finite float32 and within the limits of the mapping. Each unbroken stretch of at least two rows becomes
    ``Rows``. ``folder``: where a side-car CSV lies.

    Raises:
        UserError: a stream, a clock or a dimension that the mapping names and the episode lacks.

    """
    streams, clock = episode.streams, mapping.clock
    vectors = [(part, _find(part.stream, streams)) for part in (*mapping.proprio, *mapping.action)]
    cameras = {name: _find(camera.stream, streams, Kind.IMAGE) for name, camera in mapping.cameras.items()}
    used = [stream for _, stream in vectors] + list(cameras.values())
    times = {stream.name: _clock(stream, clock) for stream in used}
    found, masked, reasons = [], 0, dict[str, int]()
    for segment in _segments(episode, mapping, times, folder):
        if (segment.last - segment.first) * mapping.rate > _MOST_ROWS:
            raise UserError(f"{episode.name}: the {clock} clock goes from {segment.first:.6g} to {segment.last:.6g} s; "
                            "damaged stamps? type another clock in the mapping")
        at = grid(segment.first, segment.last, mapping.rate)
        good, oldest = np.ones(len(at), bool), np.zeros(len(at))
        for name, time in times.items():
            age = hold(time, at).age
            _note(reasons, f"{name}: no message of the last {mapping.max_gap:g} s", good & (age > mapping.max_gap))
            good &= age <= mapping.max_gap
            oldest = np.maximum(oldest, age)
        blocks = [_read(part, stream, times[stream.name], at) for part, stream in vectors]
        for (part, _), block in zip(vectors, blocks, strict=True):
            finite = (np.abs(block) <= np.finfo(np.float32).max).all(1)  # false of NaN
            _note(reasons, f"{part.stream}: values that are not finite", good & ~finite)
            good &= finite
            plausible = _within(part, block)
            _note(reasons, f"{part.stream}: values outside its limits", good & ~plausible)
            good &= plausible
        done = _done(mapping, episode, at)
        proprio, action = (np.concatenate(each, axis=1) for each in
                           (blocks[: len(mapping.proprio)], blocks[len(mapping.proprio) :]))
        masked += int((~good).sum())
        pictures = {name: hold(times[stream.name], at).message for name, stream in cameras.items()}
        for first, last in runs(good):
            if last - first < 2:
                masked += last - first
                _note(reasons, "a single row between two cuts", np.ones(last - first, bool))
                continue
            here, ends = slice(first, last), last == len(at)
            # What the last command of an episode led to is said one step after its last row.
            seen = done[first : last + (ends and segment.ends)]
            success, origin = _outcome(episode, mapping, segment, seen, ends=ends)
            found.append(Rows(
                name=episode.name, time=at[here], proprio=proprio[here].astype(np.float32),
                action=action[here].astype(np.float32), picture={name: each[here] for name, each in pictures.items()},
                oldest=float(oldest[here].max()), success=success, success_from=origin,
                shows_success=done[here] & (success is Success.YES),
                instruction=mapping.instruction or segment.instruction or episode.instruction,
                task="" if mapping.instruction or segment.instruction else episode.task))
    if len(found) > 1:
        found = [Rows(**{**vars(rows), "name": f"{rows.name}#{i}"}) for i, rows in enumerate(found)]
    return Sampled(rows=found, masked=masked, reasons=reasons)


def _read(part: Part, stream: Stream, time: np.ndarray, at: np.ndarray) -> Float64[np.ndarray, "k d"]:
    """The part's dimensions at these times, in the units of the store."""
    assert stream.values is not None, "only vectors are mapped to parts"
    values = stream.values[:, _columns(part, stream)]
    if not len(values):
        return np.full((len(at), values.shape[1]), np.nan)
    read = linear(time, values, at) if part.interpolate else values[hold(time, at).message]
    if part.rotation is not None:
        from data.logs.rotation import rotate  # scipy takes a second to import

        return rotate(read, *part.rotation)
    if part.opening is not None:
        closed, opened = part.opening
        return np.clip((read - closed) / (opened - closed), 0, 1)
    return read * part.scale


def _within(part: Part, block: Float64[np.ndarray, "k d"]) -> Bool[np.ndarray, " k"]:
    """Rows that are within the part's limits once they are float32."""
    if part.limits is None:
        return np.ones(len(block), bool)
    if len(part.limits) not in (1, block.shape[1]):
        raise UserError(f"{part.stream}: {len(part.limits)} limits for {block.shape[1]} dimensions; give one pair, or "
                        "one for each")
    low, high = np.array(part.limits, np.float32).T
    with np.errstate(over="ignore"):
        stored = block.astype(np.float32)
    return ((stored >= low) & (stored <= high)).all(1)


def _columns(part: Part, stream: Stream) -> list[int]:
    assert stream.values is not None, "only vectors are mapped to parts"
    width = stream.values.shape[1]
    by_name = part.dims is None or any(isinstance(wanted, str) for wanted in part.dims)
    if stream.names and len(stream.names) != width and by_name:
        raise UserError(f"{stream.name} has {width} dimensions but {len(stream.names)} names; give dims by number, or "
                        "correct the log's names")
    columns = []
    for wanted in range(width) if part.dims is None else part.dims:
        if isinstance(wanted, str):
            if wanted not in stream.names:
                known = ", ".join(stream.names) or "no names; give numbers"
                raise UserError(f"{stream.name} has no dimension {wanted!r}, but {known}")
            columns.append(stream.names.index(wanted))
        elif 0 <= wanted < width:
            columns.append(wanted)
        else:
            raise UserError(f"{stream.name} has dimensions 0 to {width - 1}, got {wanted}")
    expected = ROTATIONS[part.rotation[0]] if part.rotation is not None else len(columns)
    if len(columns) != expected:
        raise UserError(f"{stream.name}: {part.rotation[0] if part.rotation else ''} takes {expected} dims, "
                        f"got {len(columns)}")
    return columns


def _names(part: Part, stream: Stream) -> tuple[str, ...]:
    columns = _columns(part, stream)
    size = len(columns) if part.rotation is None else ROTATIONS[part.rotation[1]]
    if part.names is not None:
        if len(part.names) != size:
            raise UserError(f"{stream.name}: {len(part.names)} names for {size} dimensions; give one for each")
        return part.names
    if stream.values is not None and len(stream.names) == stream.values.shape[1] and part.rotation is None:
        return tuple(stream.names[column] for column in columns)
    return tuple(f"{stream.name}_{i}" for i in range(size))


def _find(name: str, streams: Mapping[str, Stream], kind: Kind = Kind.VECTOR) -> Stream:
    if name not in streams or streams[name].kind is not kind:
        known = ", ".join(other for other, stream in streams.items() if stream.kind is kind)
        raise UserError(f"the log has no {kind.value} stream {name!r}, but {known or 'none at all'}")
    return streams[name]


def _clock(stream: Stream, clock: str) -> Float64[np.ndarray, " n"]:
    if clock not in stream.clocks:
        raise UserError(f"{stream.name} has no clock {clock!r}, but {', '.join(stream.clocks)}; type clock: <one of "
                        "these> in the mapping")
    return stream.clocks[clock]


def _label_clock(stream: Stream, clock: str) -> Float64[np.ndarray, " n"]:
    """Labels often have no header: then the time of their arrival counts."""
    return stream.clocks["log"] if clock not in stream.clocks and "log" in stream.clocks else _clock(stream, clock)


def _segments(
    episode: LogEpisode, mapping: LogMapping, times: Mapping[str, np.ndarray], folder: Path | None
) -> Iterator[_Segment]:
    """Stretches of the recording in which every mapped stream has begun and none has ended."""
    finite = {name: time[np.isfinite(time)] for name, time in times.items()}
    for name, time in finite.items():
        if not len(time):
            raise UserError(f"{name} has no message with a {mapping.clock} stamp")
    first = max(time.min() for time in finite.values())
    last = min(time.max() for time in finite.values())
    for cut in _cuts(episode, mapping.segments, mapping, finite, folder):
        begun, ended = max(first, cut.first), min(last, cut.last)
        if begun < ended:
            yield _Segment(first=begun, last=ended, instruction=cut.instruction, success=cut.success,
                           ends=cut.ends or cut.last >= last)


def _cuts(
    episode: LogEpisode, cut: Segments, mapping: LogMapping, times: Mapping[str, np.ndarray], folder: Path | None
) -> Iterator[_Segment]:
    if cut.csv is not None:
        yield from _from_csv((folder or Path()) / cut.csv, episode.name)
    elif cut.marker is not None:
        yield from _from_marker(episode, cut.marker, mapping.clock)
    elif cut.gap is not None:
        commanded = np.sort(np.concatenate([times[part.stream] for part in mapping.action]))
        breaks = np.flatnonzero(np.diff(commanded) > cut.gap)
        firsts, lasts = np.append(0, breaks + 1), np.append(breaks, len(commanded) - 1)
        for first, last in zip(firsts, lasts, strict=True):
            yield _Segment(first=commanded[first], last=commanded[last])
    else:
        yield _Segment(first=-np.inf, last=np.inf, ends=True)


def _from_marker(episode: LogEpisode, name: str, clock: str) -> Iterator[_Segment]:
    if name not in episode.streams:
        raise UserError(f"segments: the log has no stream {name!r}, but {', '.join(episode.streams)}")
    stream = episode.streams[name]
    time = _label_clock(stream, clock)
    said: list[str] = list(stream.texts) if stream.kind is Kind.TEXT else [
        "" if value == 0 else f"{value:g}" for value in (stream.values[:, 0] if stream.values is not None else [])]
    order = np.argsort(time, kind="stable")
    changes = [i for place, i in enumerate(order) if place == 0 or said[i] != said[order[place - 1]]]
    ends = [*(time[i] for i in changes[1:]), np.inf]
    for i, end in zip(changes, ends, strict=True):
        if said[i]:
            words = said[i] if stream.kind is Kind.TEXT else None
            yield _Segment(first=time[i], last=end - _INSTANT, instruction=words)


def _from_csv(path: Path, name: str) -> Iterator[_Segment]:
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        for line in lines:
            if line["file"] == name:
                label = (line.get("success") or "").strip().lower()
                yield _Segment(first=float(line["start"]), last=float(line["end"]),
                               instruction=line.get("instruction") or None, success=Success(label) if label else None)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"segments: {path.name} cannot be read ({type(error).__name__})") from None
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"segments: {path.name} needs the columns file, start, end (s), and perhaps instruction and "
                        f"success (yes, no, unknown); {error}") from None


def _done(mapping: LogMapping, episode: LogEpisode, at: np.ndarray) -> Bool[np.ndarray, " k1"]:
    """Whether the task is done at each time, and one step after the last."""
    name = mapping.success or episode.marks
    if not name:
        return np.zeros(len(at) + 1, bool)
    stream = _find(name, episode.streams)
    held = hold(_label_clock(stream, mapping.clock), np.append(at, at[-1] + 1 / mapping.rate))
    assert stream.values is not None, "a vector has values"
    return np.isfinite(held.age) & (stream.values[held.message, 0] > 0) if len(stream) else np.zeros(len(at) + 1, bool)


def _outcome(
    episode: LogEpisode, mapping: LogMapping, segment: _Segment, done: np.ndarray, *, ends: bool
) -> tuple[Success, str]:
    """A label of the whole episode is that of the stretch with which it ends; of others nobody knows."""
    whole = ends and (episode.whole or not segment.ends)
    if mapping.success is not None and (done.any() or whole):
        return (Success.YES if done.any() else Success.NO), f"stream {mapping.success}"
    if mapping.success is None and segment.success is not None and ends:
        return segment.success, "side-car CSV"
    if mapping.success is None and segment.success is None:
        if episode.marks and done.any():
            return Success.YES, episode.success_from
        if whole and segment.ends:
            return episode.success, episode.success_from
    return Success.UNKNOWN, "cut before its end"


def _note(reasons: dict[str, int], why: str, rows: np.ndarray) -> None:
    if rows.any():
        reasons[why] = reasons.get(why, 0) + int(rows.sum())
