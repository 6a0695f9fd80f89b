"""When an episode was decided, and which of its frames show success.

An episode may go on after it was decided: a robot is recorded for some moments after it closed the drawer. These steps,
the *aftermath*, teach a world model what success looks like. Nobody learns to act from them: they hold no decision.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float32


def steps_until_decided(terminated: Bool[np.ndarray, " t"]) -> int:
    """Control steps up to and with the one that terminated; all ``t`` of them when none did."""
    return int(terminated.argmax()) + 1 if terminated.any() else len(terminated)


def success_frames(
    terminated: Bool[np.ndarray, " t"], reward: Float32[np.ndarray, " t"], *, succeeded: bool
) -> Bool[np.ndarray, " t1"]:
    """Frames in which the task is done: where a successful episode terminated, and where it is paid for afterwards.

    An episode that succeeded but was not terminated has none: nobody knows when it succeeded.
    """
    shown = np.zeros(len(terminated) + 1, bool)
    if succeeded and terminated.any():
        step = int(terminated.argmax())
        shown[step + 1] = True
        shown[step + 2 :] = reward[step + 1 :] > 0
    return shown


def undecided_frames(terminated: Bool[np.ndarray, " t"]) -> Bool[np.ndarray, " t1"]:
    """Frames before the one in which the episode terminated: all of them when none did.

    Together with ``success_frames`` these are the frames that say whether a task is done. Those of an aftermath in
    which it is no longer paid for say neither: a handle may have been pressed further than the target, or let go.
    """
    return np.arange(len(terminated) + 1) < (steps_until_decided(terminated) + (not terminated.any()))
