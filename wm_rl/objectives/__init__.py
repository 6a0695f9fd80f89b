"""Policy objectives: how much each stale action token may move the policy. One file per family.

Every objective here is a surrogate J whose gradient is ``E[c · A · ∇ log π]``; they differ only in the *coefficient*
``c(log r, A)``, with ``log r = log π − log π_behaviour``. No objective knows where its data came from: what is trusted
more or less reaches it as ``width`` (``wm_rl.trust``). docs/objective.md derives the bounds and shows the shapes.
"""

from wm_rl.objectives.base import LOG_RATIO_LIMIT, Objective, surrogate_loss
from wm_rl.objectives.importance import NoClip, TruncatedIs
from wm_rl.objectives.kernel import Gipo
from wm_rl.objectives.ppo import PpoClip
from wm_rl.objectives.sapo import Sapo
from wm_rl.objectives.second_moment import SecondMoment

__all__ = ["LOG_RATIO_LIMIT", "Gipo", "NoClip", "Objective", "PpoClip", "Sapo", "SecondMoment", "TruncatedIs",
           "surrogate_loss"]
