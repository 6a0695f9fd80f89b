"""Other sentences for LIBERO's tasks: it has one for each."""

from __future__ import annotations

import re

from sim.tasks import wordy

_SYNONYMS = {"pick up": ("grab", "take"), "place": ("set", "leave"), "put": ("set", "lay"),
             "open": ("pull open", "get open"), "close": ("shut", "push shut"), "push": ("shove", "slide"),
             "stack": ("pile", "set"), "turn on": ("switch on", "start"), "turn off": ("switch off", "shut off")}
"""What LIBERO's sentences ask for, in two other ways."""
_ASKED = re.compile(rf"\b({'|'.join(_SYNONYMS)})\b")


def phrase(sentence: str, kind: str, seed: int) -> str:
    """``sentence`` in one of ``sim.perturbation.PHRASINGS``; of several ways the seed picks one."""
    if kind == "usual":
        return sentence
    other = _ASKED.sub(lambda verb: _SYNONYMS[verb[1]][seed % 2], sentence)
    return other if kind == "held_out" else wordy(other)


def can_be_phrased(sentence: str) -> bool:
    """Whether it has another way."""
    return bool(_ASKED.search(sentence))
