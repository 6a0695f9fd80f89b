"""Instructions as integers, for policies and world models that bring no tokenizer of their own."""

from __future__ import annotations

import re
import zlib

PAD = 0
"""Token after the last word."""


def tokenize(instruction: str, length: int = 24, vocabulary: int = 2048) -> list[int]:
    """Hash each lower-cased word into ``1 .. vocabulary - 1``; pad with 0, or cut, to ``length`` tokens.

    The hash is CRC-32, so a word has the same token in every process and on every machine. Two words may share one.
    """
    words = re.findall(r"\w+", instruction.lower())[:length]
    tokens = [1 + zlib.crc32(word.encode()) % (vocabulary - 1) for word in words]
    return tokens + [PAD] * (length - len(tokens))
