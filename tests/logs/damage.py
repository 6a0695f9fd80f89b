"""Damaged bytes, and what any reader must give for them."""

import contextlib
import json

import numpy as np

from data.logs.streams import Kind, LogEpisode, Refused


def flipped(content, random_state):
    """The bytes with one, two or eight bits turned over."""
    changed = bytearray(content)
    for _ in range(random_state.choice((1, 2, 8))):
        changed[random_state.randrange(len(changed))] ^= 1 << random_state.randrange(8)
    return bytes(changed)


def well_formed(episodes):
    """Lengths agree, a refusal is one line, and decoding raises nothing but ValueError."""
    for episode in episodes:
        if isinstance(episode, Refused):
            assert episode.reason
            assert "\n" not in episode.reason
            continue
        assert isinstance(episode, LogEpisode)
        json.dumps(episode.facts, allow_nan=False)
        for name, stream in episode.streams.items():
            assert stream.name == name
            assert {len(clock) for clock in stream.clocks.values()} == {len(stream)}
            if stream.kind is Kind.VECTOR:
                assert stream.values.shape[0] == len(stream)
                assert stream.values.dtype == np.float64
            elif stream.kind is Kind.TEXT:
                assert len(stream.texts) == len(stream)
            else:
                for number in range(len(stream)):
                    with contextlib.suppress(ValueError):
                        (picture,) = stream.pictures([number])
                        assert picture.dtype == np.uint8
                        assert picture.ndim == 3
                        assert picture.shape[2] == 3
