"""What the streams of a log are to a policy: roles, clock, rate, and how an episode is cut. Read from one YAML."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.types import UserError

CLOCKS = ("header", "publish", "log", "nominal", "index")
ROTATIONS = {"quaternion_xyzw": 4, "quaternion_wxyz": 4, "euler_xyz": 3, "rotation_vector": 3, "matrix": 9,
             "rotation_6d": 6}
"""Numbers of each representation. Euler angles are in radians about the fixed x, y and z axes; ``rotation_6d`` is the
first two columns of the matrix (Zhou et al. 2019, arXiv 1812.07035)."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some dimensions of ``proprio`` or ``action``, from one stream."""

    stream: str
    dims: tuple[str, ...] | tuple[int, ...] | None = None
    """Which of its dimensions, by name (or by number where the log has no names); null: all, in the log's order."""
    names: tuple[str, ...] | None = None
    """What the store calls them; null: the log's names, or ``<stream>_<number>``."""
    scale: float = 1.0
    """Factor to the unit of the store, e.g. 0.001 from mm to m."""
    opening: tuple[float, float] | None = None
    """For a gripper: its readings when closed and when open; becomes 0 closed, 1 open, whatever the log's polarity."""
    rotation: tuple[str, str] | None = None
    """Representation in the log and in the store, of ``ROTATIONS``; the dims are one rotation."""
    limits: tuple[tuple[float, float], ...] | None = None
    """Lowest and highest plausible value, in the unit of the store: one pair for all dimensions, or one for each. Rows
    outside are left out."""
    interpolate: bool = False
    """Linearly between messages, which looks ahead; otherwise the newest message that is not from the future."""

    def __post_init__(self) -> None:
        if self.opening is not None and self.opening[0] == self.opening[1]:
            raise UserError(f"{self.stream}: opening needs two different readings, closed and open, got {self.opening}")
        for low, high in self.limits or ():
            if not low < high:
                raise UserError(f"{self.stream}: limits are pairs of lowest and highest, got {low:g} and {high:g}")
        if self.limits is not None and self.opening is not None:
            raise UserError(f"{self.stream}: an opening is from 0 to 1 and needs no limits; remove one of them")
        for name in self.rotation or ():
            _one_of(f"{self.stream}: rotation", name, tuple(ROTATIONS))
        if self.rotation is not None and self.interpolate:
            raise UserError(f"{self.stream}: rotations are held, not interpolated; remove interpolate")


@dataclass(frozen=True, kw_only=True)
class Camera:
    """One camera."""

    stream: str
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """Left, top, right, bottom of the part that is kept, as shares of the picture."""
    turned: bool = False
    """The log's picture is turned by half a turn, then cropped. LIBERO's demonstrations need it."""

    def __post_init__(self) -> None:
        left, top, right, bottom = self.crop
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"{self.stream}: crop is left, top, right, bottom as shares of the picture, "
                            f"got {self.crop}")


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where episodes begin and end within a recording."""

    marker: str | None = None
    """A stream: every change of its value (text or number) begins another episode. An empty text or a 0 is between
    episodes."""
    gap: float | None = None
    """Seconds without a command after which another episode begins."""
    csv: str | None = None
    """File with the columns ``file, start, end`` (s since the recording began) and perhaps ``instruction, success``."""

    def __post_init__(self) -> None:
        given = [name for name in ("marker", "gap", "csv") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"segments: give one of marker, gap and csv, got {' and '.join(given)}")


@dataclass(frozen=True, kw_only=True)
class LogMapping:
    """The whole mapping. Streams by their names as ``ingest action=inspect`` prints them."""

    proprio: tuple[Part, ...]
    action: tuple[Part, ...]
    """What was *commanded*. The next state is another action: on a real robot it lags by 133 to 333 ms."""
    cameras: Mapping[str, Camera]
    """Name in the store -> camera. May be empty for a policy without pictures."""
    clock: str
    rate: float
    """Control steps per second in the store."""
    max_gap: float = 0.5
    """Seconds after which a held message is too old: the episode is cut there."""
    instruction: str | None = None
    """The sentence; null: the log's own."""
    success: str | None = None
    """A stream that is 1 where the task is done; null: what the log says of the episode, otherwise unknown."""
    embodiment: str = "robot"
    segments: Segments = field(default_factory=Segments)

    def __post_init__(self) -> None:
        _one_of("clock", self.clock, CLOCKS)
        if not self.rate > 0:
            raise UserError(f"rate: expected control steps per second, got {self.rate}")
        if not self.max_gap > 0:
            raise UserError(f"max_gap: expected seconds, got {self.max_gap}")
        if not self.action or not self.proprio:
            raise UserError("a mapping needs at least one part of proprio and one of action")


def read_mapping(path: str | Path) -> LogMapping:
    """Read a YAML file. Raises ``UserError`` that names the key that is wrong, and the nearest known one."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"mapping={path}: no such file; python main.py ingest action=inspect writes one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"mapping={path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    return _build(LogMapping, content, str(path))


def to_yaml(mapping: LogMapping) -> str:
    """Text that ``read_mapping`` reads back; what is at its default is left out."""
    return yaml.safe_dump(_plain(mapping), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)
                if getattr(value, f.name) != (f.default_factory() if callable(f.default_factory) else f.default)}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _build(kind: type, content: Any, where: str) -> Any:
    """An instance of the dataclass ``kind`` from plain values."""
    if not isinstance(content, Mapping):
        raise UserError(f"{where}: expected keys and values, got {content!r:.80}")
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else
                            f"; known are {', '.join(hints)}"))
    for each in dataclasses.fields(kind):
        if each.name not in content and each.default is dataclasses.MISSING and each.default_factory is \
                dataclasses.MISSING:
            raise UserError(f"{where}: {each.name} is missing")
    return kind(**{key: _value(hints[key], value, f"{where}: {key}") for key, value in content.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type that ``hint`` says. Raises ``UserError``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        reasons = []
        for choice in inner:
            try:
                return _value(choice, value, where)
            except UserError as error:
                reasons.append(error)
        raise reasons[0]
    if hint is types.NoneType:
        if value is None:
            return None
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    elif origin is tuple and isinstance(value, list | tuple):
        if inner[-1] is Ellipsis:
            return tuple(_value(inner[0], each, where) for each in value)
        if len(value) == len(inner):
            return tuple(_value(each, item, where) for each, item in zip(inner, value, strict=True))
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {str(key): _value(inner[1], each, f"{where}.{key}") for key, each in value.items()}
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{where}: expected {_describe(hint)}, got {value!r:.80}")


def _describe(hint: Any) -> str:
    plain = {float: "a number", int: "a whole number", str: "a word", bool: "true or false", types.NoneType: "null"}
    return plain.get(hint) or str(hint).replace("typing.", "")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise UserError(f"{name}: expected one of {', '.join(known)}, got {value!r}"
                        + (f"; did you mean {near[0]}?" if near else ""))
