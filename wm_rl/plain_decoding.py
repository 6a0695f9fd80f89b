"""Decode every picture of some logs with the libraries alone: ``python -m wm_rl.plain_decoding [--reduced] FILE...``.

What ingestion is measured against: no clock, no mapping, no scaling, no store, and nothing of this project imported.
``--reduced`` lets libjpeg decode to half the width and height.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from mcap.reader import make_reader
from PIL import Image

_ENCODED_AT = 4 + 8
"""Bytes of a CDR message before its frame's name: encapsulation and stamp."""


def main(words: list[str]) -> int:
    """Print how many pictures there were."""
    files = [Path(word) for word in words if word != "--reduced"]
    reduced = len(files) < len(words)
    print(sum(sum(1 for _ in (_video(file) if file.suffix == ".mp4" else _bag(file, reduced))) for file in files))
    return 0


def _video(file: Path) -> Iterator[np.ndarray]:
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def _bag(file: Path, reduced: bool) -> Iterator[np.ndarray]:
    with file.open("rb") as stream:
        for schema, _, message in make_reader(stream).iter_messages():
            if schema is not None and schema.name == "sensor_msgs/msg/CompressedImage":
                data = message.data
                with Image.open(io.BytesIO(data[data.index(b"\xff\xd8", _ENCODED_AT) :])) as picture:
                    if reduced:
                        picture.draft(None, (picture.width // 2, picture.height // 2))
                    yield np.asarray(picture.convert("RGB"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
