"""Instructions as integers, for policies and world models that bring no tokenizer; integers and errors as text."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

PAD = 0
"""Token after the last word."""


def tokenize(instruction: str, length: int = 24, vocabulary: int = 2048) -> list[int]:
    """Hash each lower-cased word into ``1 .. vocabulary - 1``; pad with 0, or cut, to ``length`` tokens.

    The hash is CRC-32, so a word has the same token in every process and on every machine. Two words may share one.
    """
    words = re.findall(r"\w+", instruction.lower())[:length]
    tokens = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words]
    return tokens + [PAD] * (length - len(tokens))


def ranges(numbers: Sequence[int]) -> str:
    """``[0, 3, 4, 5]`` as ``0, 3-5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def one_line(error: Exception) -> str:
    """What a library says, for people: at most 160 printable characters, without the path of an ``OSError``."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return "".join(c for c in " ".join(said.split()) if c.isprintable())[:160] or type(error).__name__
