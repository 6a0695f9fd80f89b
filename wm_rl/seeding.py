"""One way to get randomness: a seed derived from the run's seed and the name of what needs it.

Nothing here or elsewhere draws from a global generator, so a resumed run repeats what it would have drawn.
"""

from __future__ import annotations

import hashlib

TRAINING_SEEDS = 1 << 30
"""Episode seeds from here up are for training; evaluation uses those below, so its goals are held out."""


def derive(seed: int, *path: int | str) -> int:
    """A 30-bit seed that depends on all arguments, e.g. ``derive(seed, "collect", iteration, slot)``."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % TRAINING_SEEDS


def training_episode(seed: int, *path: int | str) -> int:
    """Seed of a training episode: never one that evaluation uses."""
    return TRAINING_SEEDS + derive(seed, *path)
