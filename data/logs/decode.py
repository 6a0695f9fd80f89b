"""Episodes with their pictures, decoded by processes side by side and handed over in order."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.logs.mapping import LogMapping
from data.logs.sample import Rows, sample
from data.logs.streams import LogEpisode, Refused, Stream
from data.logs.survey import Wanted, Watch, episode_key, episodes_of, log_name
from data.types import UserError


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
        left = {each.number: each for each in group}
        log = log_name(path, root)
        for number, episode in enumerate(episodes_of(family, path)):
            if number in left:
                if isinstance(episode, Refused):
                    yield log, episode
                else:
                    yield from _decode(episode, log, left[number].keys, root, mapping, image_size)
                del left[number]
                yield None
            if not left:
                break
        for each in left.values():
            yield log, Refused(name=each.name, reason="it was there before and is gone now; is the log being written?")
            yield None


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
    for item in _alone(wanted, root, mapping, image_size, 1):
        pipe.send(item)


def _decode(
    episode: LogEpisode, log: str, keys: frozenset[str], root: Path, mapping: LogMapping, image_size: int
) -> Iterator[Found | tuple[str, Refused]]:
    try:
        stretches = sample(episode, mapping, folder=root).rows
    except UserError as reason:  # the survey found none: the file has changed since
        yield log, Refused(name=episode.name, reason=str(reason))
        return
    for rows in stretches:
        key = episode_key(episode, rows)
        if key not in keys:
            continue
        try:
            frames = {name: _pictures(episode.streams[camera.stream], rows.picture[name], camera.crop, image_size)
                      for name, camera in mapping.cameras.items()}
        except ValueError as reason:
            yield log, Refused(name=rows.name, reason=str(reason))
        else:
            yield Found(log=log, key=key, rows=rows, frames=frames, facts=dict(episode.facts))


def _pictures(
    stream: Stream, messages: np.ndarray, crop: tuple[float, float, float, float], size: int
) -> UInt8[np.ndarray, "r size size 3"]:
    """Squares of ``size`` pixels (PIL, bilinear, each message decoded once). Raises ``ValueError``."""
    assert stream.pictures is not None, "an image stream has pictures"
    wanted, place = np.unique(messages, return_inverse=True)
    made = np.empty((len(wanted), size, size, 3), np.uint8)
    count = 0
    for count, picture in enumerate(stream.pictures(wanted.tolist()), 1):
        height, width = picture.shape[:2]
        box = (crop[0] * width, crop[1] * height, crop[2] * width, crop[3] * height)
        made[count - 1] = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box=box))
    if count != len(wanted):
        raise ValueError(f"{stream.name}: {count} pictures for {len(wanted)} messages")
    return made[place.reshape(-1)]
