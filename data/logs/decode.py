"""Episodes with their pictures, decoded by processes side by side and handed over in order."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.logs.mapping import Camera, LogMapping
from data.logs.sample import Rows
from data.logs.streams import LogEpisode, Pictures, Refused
from data.logs.survey import Wanted, Watch, episodes_of, log_name, pictures_of
from data.types import UserError

GAP = 3.0
"""JPEG files are decoded at no less than this many times the size that they are stored in; the rest is bilinear. At 2
hard edges are up to 11 levels of 255 from what decoding whole gives, at 3 up to 6 (tests)."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stretch of an episode, and its pictures."""

    log: str
    key: str
    rows: Rows
    frames: Mapping[str, UInt8[np.ndarray, "r size size 3"]]
    facts: Mapping[str, Any]


def decode_all(
    wanted: Sequence[Wanted], root: Path, mapping: LogMapping, image_size: int, workers: int, watch: Watch
) -> Iterator[Found | tuple[str, Refused]]:
    """What is in every wanted episode, in order; of what is refused also the log.

    Each process decodes every ``workers``-th episode; a pipe holds back who is ahead. One worker is this process.
    """
    workers = max(1, min(workers, len(wanted)))
    read = _alone if workers == 1 else _side_by_side
    done = 0
    for item in read(wanted, root, mapping, image_size, workers):
        if item is None:
            done += 1
            watch("decode", done, len(wanted))
        else:
            yield item


def _alone(
    wanted: Sequence[Wanted], root: Path, mapping: LogMapping, image_size: int, workers: int
) -> Iterator[Found | tuple[str, Refused] | None]:
    """What each wanted episode holds, and None after each."""
    for (family, path), group in itertools.groupby(wanted, key=lambda each: (each.family, each.path)):
        log = log_name(path, root)
        for each, pictures in _with_pictures(family, path, list(group), mapping):
            if isinstance(pictures, Refused):
                yield log, pictures
            else:
                yield from _decode(each, log, pictures, mapping, image_size)
            yield None


def _with_pictures(
    family: str, path: Path, wanted: Sequence[Wanted], mapping: LogMapping
) -> Iterator[tuple[Wanted, Mapping[str, Pictures] | Refused]]:
    """The wanted episodes of a log, which is read again only where the survey could not hand its pictures on."""
    handed = [each.pictures for each in wanted if each.pictures is not None]
    if len(handed) == len(wanted):
        yield from zip(wanted, handed, strict=True)
        return
    left = {each.number: each for each in wanted}
    for number, episode in enumerate(episodes_of(family, path)):
        if number in left:
            each = left.pop(number)
            if isinstance(episode, LogEpisode) and episode.sha256 != each.sha256:
                episode = Refused(name=each.name, reason="it has changed since it was read; is the log being written?")
            yield each, episode if isinstance(episode, Refused) else pictures_of(episode, mapping)
        if not left:
            break
    for each in left.values():
        yield each, Refused(name=each.name, reason="it was there before and is gone now; is the log being written?")


def _side_by_side(
    wanted: Sequence[Wanted], root: Path, mapping: LogMapping, image_size: int, workers: int
) -> Iterator[Found | tuple[str, Refused] | None]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for i in range(workers):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, daemon=True,
                                  args=(theirs, wanted[i::workers], root, mapping, image_size))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for i, each in enumerate(wanted):
            item: Found | tuple[str, Refused] | None
            try:
                while (item := pipes[i % workers].recv()) is not None:
                    yield item
            except EOFError:
                raise UserError(f"the process that read {log_name(each.path, root)} {each.name} died; that is often "
                                "memory: try workers=1") from None
            yield None
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _serve(pipe: Connection, wanted: Sequence[Wanted], root: Path, mapping: LogMapping, image_size: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever reads was killed
        for item in _alone(wanted, root, mapping, image_size, 1):
            pipe.send(item)


def _decode(
    wanted: Wanted, log: str, pictures: Mapping[str, Pictures], mapping: LogMapping, image_size: int
) -> Iterator[Found | tuple[str, Refused]]:
    for key, rows in wanted.stretches.items():
        try:
            frames = {name: _squares(pictures[name], rows.picture[name], camera, image_size)
                      for name, camera in mapping.cameras.items()}
        except ValueError as reason:
            yield log, Refused(name=rows.name, reason=str(reason))
        else:
            yield Found(log=log, key=key, rows=rows, frames=frames, facts=wanted.facts)


def _squares(
    pictures: Pictures, messages: np.ndarray, camera: Camera, size: int
) -> UInt8[np.ndarray, "r size size 3"]:
    """Squares of ``size`` pixels (PIL, bilinear, each message decoded once). Raises ``ValueError``."""
    left, top, right, bottom = camera.crop
    least = math.ceil(GAP * size / (bottom - top)), math.ceil(GAP * size / (right - left))
    wanted, place = np.unique(messages, return_inverse=True)
    made = np.empty((len(wanted), size, size, 3), np.uint8)
    count = 0
    for count, picture in enumerate(pictures(wanted.tolist(), least), 1):
        picture = np.ascontiguousarray(picture[::-1, ::-1]) if camera.turned else picture
        height, width = picture.shape[:2]
        box = (left * width, top * height, right * width, bottom * height)
        made[count - 1] = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box))
    if count != len(wanted):
        raise ValueError(f"{camera.stream}: {count} pictures for {len(wanted)} messages")
    return made[place.reshape(-1)]
