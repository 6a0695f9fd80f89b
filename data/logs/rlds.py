"""Read RLDS sets in TFRecord files, as Open X-Embodiment has them, without TensorFlow.

A record is an episode: a ``tf.train.Example`` whose features ``steps/<path>`` list the values of all steps one after
the other. ``features.json`` of tensorflow-datasets beside it says the shape of each; without it, the lengths of the
lists do. Open X-Embodiment: https://arxiv.org/abs/2310.08864, RLDS: https://github.com/google-research/rlds
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.logs.hdf5 import INSTRUCTIONS, as_flag, as_json
from data.logs.pictures import UnusableError, array_stream, counted, index_clock, is_label, is_name
from data.logs.streams import LogEpisode, Refused, Stream
from data.logs.tfrecord import CutError, Feature, Record, parse_example, peek, read_records
from data.text import one_line, ranges
from data.types import Success, UserError

STEPS = "steps/"
REWARD = "steps/reward"
SENTENCES = (*INSTRUCTIONS, "natural_language_instruction")
"""Last parts of the names of features that hold an instruction."""
OUTCOMES = ("success", "is_success")
SCALARS = ("is_first", "is_last", "is_terminal", "reward", "discount")
"""Features of one number per step, in every RLDS set."""
SHARD = re.compile(r"(?:.*?-)?(?P<split>[^-]*)\.tfrecord(?:-(?P<number>\d{5})-of-(?P<count>\d{5}))?")


@dataclass(frozen=True)
class _Spec:
    """What ``features.json`` says of a feature."""

    shape: tuple[int, ...]
    """Of a step; -1 where it varies."""
    dtype: str
    """``string`` of texts and of encoded pictures."""


class RldsLog:
    """An opened set. Use ``open_log``."""

    format = "RLDS (TFRecord)"

    def __init__(self, path: Path) -> None:
        """List the shards. Raises ``UserError`` when none has a record, or the first record is no RLDS episode."""
        self.path = path
        self._shards = _shards(path)
        folder = path if path.is_dir() else path.parent
        self._specs = _specs(folder / "features.json")
        self._info = _read_json(folder / "dataset_info.json")
        first = next(filter(None, map(_first_record, self._shards)), None)
        if first is None:
            raise UserError(f"{path}: expected RLDS episodes in TFRecord files, found no whole record; check the path, "
                            "or copy the set again")
        if not first.damage and not _is_episode(first):
            raise UserError(f"{path}: expected RLDS episodes in TFRecord files, found records without steps/<name>; "
                            "convert the set to RLDS")

    def episodes(self) -> Iterator[LogEpisode | Refused]:
        """Every record of every shard, in the order of their names, then shards that are missing."""
        for shard in self._shards:
            number = 0
            try:
                for number, record in enumerate(read_records(shard), 1):
                    name = f"{shard.name} record {number - 1}"
                    try:
                        if record.damage:
                            raise ValueError(record.damage)
                        yield self._episode(name, shard, record)
                    except (UnusableError, ValueError) as error:
                        yield Refused(name=name, reason=one_line(error))
            except (CutError, OSError) as error:
                yield Refused(name=f"{shard.name} from record {number} on", reason=one_line(error))
            else:
                promised = self._promised(shard)
                if promised not in (None, number):
                    yield Refused(name=shard.name, reason=f"dataset_info.json counts {promised} episodes in it, found "
                                                          f"{number}; half-copied?")
        yield from self._missing_shards()

    def _episode(self, name: str, shard: Path, record: Record) -> LogEpisode:
        features = parse_example(record.content)
        skipped: dict[str, str] = {}
        of_steps = {key: feature for key, feature in features.items() if key.startswith(STEPS)}
        steps = _count_steps(of_steps, self._specs)
        clocks = index_clock(steps)
        streams: dict[str, Stream] = {}
        for key, feature in of_steps.items():
            try:
                if not is_name(key):
                    raise UnusableError("with a name that is none")
                rows, schema = self._rows(key, feature, steps, shard, record)
                streams[key] = array_stream(key, rows, clocks, schema)
            except UnusableError as error:
                skipped[key] = str(error)
        about = {key: _plain(feature, record) for key, feature in features.items() if key not in of_steps}
        success, success_from = self._success(streams, about)
        sentences = _sentences(streams, about)
        return LogEpisode(
            name=name, streams=streams, instruction=sentences[0] if sentences else "", success=success,
            success_from=success_from, problems=counted(skipped), sha256=hashlib.sha256(record.content).hexdigest(),
            facts={"format": self.format, "file": shard.name, "rows": steps, "clock": "none",
                   "shapes": "features.json" if self._specs else "lengths of the lists",
                   **({"instructions": len(sentences)} if len(sentences) > 1 else {}),
                   **{key: value for key, value in about.items() if is_name(key) and isinstance(value, int | float)
                      and math.isfinite(value)}})

    def _rows(self, key: str, feature: Feature, steps: int, shard: Path, record: Record) -> tuple[Any, str]:
        """The values of a feature, a row per step, and what a row is. Raises ``UnusableError``."""
        spec = self._specs.get(key)
        if self._specs and spec is None:
            raise UnusableError("not in features.json as a list of one shape")
        if not len(feature):
            raise UnusableError("empty")
        if isinstance(feature, list):
            if len(feature) != steps:
                raise UnusableError(f"of {len(feature)} texts or pictures for {steps} steps")
            return _Blobs(shard, record.offset, feature), "bytes"
        if len(feature) % steps:
            raise UnusableError(f"of {len(feature)} numbers for {steps} steps")
        shape: tuple[int, ...] = (len(feature) // steps,) if len(feature) != steps else ()
        if spec is not None and min(spec.shape, default=1) > 0:
            shape = spec.shape
        values = feature.reshape(steps, *shape)
        if spec is not None and spec.dtype == "uint8" and values.size and 0 <= values.min() <= values.max() <= 255:
            values = values.astype(np.uint8)
        return values, f"{spec.dtype if spec else values.dtype} {list(shape)}"

    def _success(self, streams: Mapping[str, Stream], about: Mapping[str, Any]) -> tuple[Success, str]:
        for key, value in about.items():
            said = as_flag(value) if key.split("/")[-1] in OUTCOMES else None
            if said is not None:
                return (Success.YES if said else Success.NO), key
        reward = streams.get(REWARD)
        if reward is None or not self._labelled:
            return Success.UNKNOWN, "no success in the episode's metadata; rewards are missing, all 0, or no label"
        return (Success.YES if np.any(reward.values) else Success.NO), f"{REWARD}: 1 in some step"

    @cached_property
    def _labelled(self) -> bool:
        """Rewards are 0 and 1 throughout the set, and not all of them 0."""
        return is_label([rewards for shard in self._shards for rewards in peek(shard, REWARD)])

    def _promised(self, shard: Path) -> int | None:
        """Episodes of a shard that ``dataset_info.json`` counts."""
        match = SHARD.fullmatch(shard.name)
        splits = self._info.get("splits")
        for split in splits if isinstance(splits, list) and match else ():
            if isinstance(split, dict) and match and split.get("name") == match["split"]:
                lengths = split.get("shardLengths")
                number = int(match["number"] or 0)
                if isinstance(lengths, list) and number < len(lengths) and str(lengths[number]).isdecimal():
                    return int(lengths[number])
        return None

    def _missing_shards(self) -> Iterator[Refused]:
        found: dict[tuple[str, int], set[int]] = {}
        for shard in self._shards if self.path.is_dir() else ():
            match = SHARD.fullmatch(shard.name)
            if match and match["number"]:
                found.setdefault((match["split"], int(match["count"])), set()).add(int(match["number"]))
        for (split, count), numbers in found.items():
            if missing := sorted(set(range(count)) - numbers):
                yield Refused(name=f"split {split}", reason=f"shards {ranges(missing)} of {count} are missing")


class _Blobs:
    """Texts or encoded pictures, read from the file when indexed."""

    dtype = np.dtype("S")

    def __init__(self, file: Path, offset: int, spans: list[slice]) -> None:
        self._file, self._offset, self._spans = file, offset, spans
        self.shape = (len(spans),)

    def __getitem__(self, rows: Any) -> Any:
        spans = self._spans[rows]
        with self._file.open("rb") as file:
            found = [self._read(file, span) for span in (spans if isinstance(spans, list) else [spans])]
        return found if isinstance(spans, list) else found[0]

    def _read(self, file: Any, span: slice) -> bytes:
        file.seek(self._offset + span.start)
        return file.read(span.stop - span.start)


def sniff(path: Path) -> str | None:
    """``RLDS (TFRecord)`` of a file, or of a folder with such files; never raises."""
    try:
        for shard in _shards(path):
            first = _first_record(shard)
            if first is not None and not first.damage:
                return RldsLog.format if _is_episode(first) else None
            if shard.stat().st_size and SHARD.fullmatch(shard.name):
                return RldsLog.format  # damaged: opening it says how
    except OSError:
        pass
    return None


def open_log(path: Path) -> RldsLog:
    """Open a TFRecord file, or a folder of shards. Raises ``UserError`` when there is no RLDS episode in it."""
    return RldsLog(path)


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.iterdir() if SHARD.fullmatch(file.name) and file.is_file())


def _first_record(shard: Path) -> Record | None:
    try:
        return next(read_records(shard), None)
    except (CutError, OSError):
        return None


def _is_episode(record: Record) -> bool:
    try:
        return any(key.startswith(STEPS) for key in parse_example(record.content))
    except ValueError:
        return False


def _read_json(file: Path) -> dict[str, Any]:
    """Empty when it is missing, damaged or no object."""
    try:
        found = as_json(file.read_text(errors="replace"))
    except OSError:
        return {}
    return found if isinstance(found, dict) else {}


def _specs(file: Path) -> dict[str, _Spec]:
    """Features of a step by their names in a record; empty when ``features.json`` is missing or damaged."""
    found: dict[str, _Spec] = {}

    def add(name: str, feature: Any, lengths: tuple[int, ...]) -> None:
        if not isinstance(feature, dict):
            return
        if "featuresDict" in feature:
            for key, inner in _dict(_dict(feature["featuresDict"]).get("features")).items():
                add(f"{name}/{key}" if name else key, inner, lengths)
        elif "sequence" in feature:
            length = _number(_dict(feature["sequence"]).get("length"))
            add(name, _dict(feature["sequence"]).get("feature"), lengths if name == STEPS[:-1] else (*lengths, length))
        elif "image" in feature or "text" in feature:
            found[name] = _Spec(lengths, "string")
        elif "classLabel" in feature:
            found[name] = _Spec(lengths, "int64")
        elif "tensor" in feature:
            tensor = _dict(feature["tensor"])
            shape = _dict(tensor.get("shape")).get("dimensions") or []
            if tensor.get("encoding", "none") in ("none", "") and isinstance(shape, list):
                found[name] = _Spec((*lengths, *map(_number, shape)), str(tensor.get("dtype")))

    add("", _read_json(file), ())
    return {name: spec for name, spec in found.items() if name.startswith(STEPS)}


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> int:
    """A length in ``features.json``, which may be text; -1 for what is none."""
    return int(value) if str(value).isdecimal() and len(str(value)) < 10 else -1


def _count_steps(features: Mapping[str, Feature], specs: Mapping[str, _Spec]) -> int:
    """Of an episode. Raises ``ValueError`` when it has none, or its features do not agree."""
    counts: dict[str, int] = {}
    for key, feature in features.items():
        spec = specs.get(key)
        if spec is not None and len(feature) and min(spec.shape, default=1) > 0:
            counts[key], rest = divmod(len(feature), math.prod(spec.shape))
            if rest:
                raise ValueError(f"{key} has {len(feature)} values, expected a multiple of {list(spec.shape)}")
    if not specs:
        scalars = {key: len(feature) for key, feature in features.items() if key.split("/")[-1] in SCALARS}
        counts = scalars or {key: len(feature) for key, feature in features.items() if isinstance(feature, list)}
        counts = counts or {key: len(features[key]) for key in sorted(features, key=lambda key: len(features[key]))[:1]}
    if not counts or max(counts.values()) == 0:
        raise ValueError("no steps, or none that features.json describes; an episode needs at least one")
    key, other = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    if counts[key] != counts[other]:
        raise ValueError(f"{key} has {counts[key]} steps, {other} has {counts[other]}")
    return counts[key]


def _plain(feature: Feature, record: Record) -> Any:
    """The value of a feature of the whole episode, if it is one; texts may hold paths and are for instructions only."""
    if len(feature) != 1:
        return None
    if isinstance(feature, list):
        return record.content[feature[0]].decode(errors="replace")
    return feature[0].item()


def _sentences(streams: Mapping[str, Stream], about: Mapping[str, Any]) -> list[str]:
    """Different instructions of an episode, in the order in which they are given."""
    texts = [text for name in SENTENCES for key, stream in streams.items() if key.split("/")[-1] == name
             for text in stream.texts]
    texts += [value for key, value in about.items() if key.split("/")[-1] in SENTENCES and isinstance(value, str)]
    return list(dict.fromkeys(filter(None, (" ".join(text.split()) for text in texts))))
