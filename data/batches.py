"""What learners read of trajectories: torch, one column per policy decision or control step.

Axes as in ``data.types``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from data.types import Source


@dataclass(frozen=True, kw_only=True)
class DecisionBatch:
    """Windows of decisions as a learner reads them, padded to ``d`` columns.

    Column ``i`` of row ``j`` is real where ``mask[j, i]``; real columns come first. The observation that follows the
    last real decision of row ``j`` is ``final_*[j]``, from which a value is bootstrapped unless ``terminated[j]``.
    """

    frames: Mapping[str, UInt8[Tensor, "b d h w 3"]]
    proprio: Float[Tensor, "b d p"]
    instruction: Sequence[str]
    """``b`` sentences, one per window."""
    token: Int[Tensor, "b d k a"]
    log_prob: Float[Tensor, "b d k a"]
    token_mask: Bool[Tensor, "b d k"]
    """False where the episode ended, or the policy looked again, inside the chunk, and where ``mask`` is false."""
    mask: Bool[Tensor, "b d"]
    reward: Float[Tensor, "b d"]
    """Sum over the chunk of ``discount ** i`` times the reward of its ``i``-th control step."""
    discount: Float[Tensor, "b d"]
    """``discount`` to the power of the control steps until the next decision."""
    terminated: Bool[Tensor, " b"]
    """The last real decision ended the episode without a value to follow."""
    final_frames: Mapping[str, UInt8[Tensor, "b h w 3"]]
    final_proprio: Float[Tensor, "b p"]
    policy_version: Int64[Tensor, "b d"]
    uncertainty: Float[Tensor, "b d"]
    """Mean over the chunk of the world model's uncertainty; 0 where nothing was imagined."""
    source: Sequence[Source]
    """``b`` sources, one per window."""
    cloned: Bool[Tensor, " b"]
    """The behaviour ``log_prob`` is an estimate by a cloned policy."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """Windows of ``s`` control steps as a world model reads them: ``s + 1`` frames, ``context`` seen, ``horizon`` not.

    ``s = context + horizon - 1``. ``action[:, i]`` leads from observation ``i`` to observation ``i + 1``; the first
    ``context`` observations are seen, so ``action[:, context - 1]`` is the first whose outcome is to be predicted.
    Before an episode's beginning its first observation repeats, after its end its last; there ``action`` is 0 and
    ``mask`` false.
    """

    frames: Mapping[str, UInt8[Tensor, "b s1 h w 3"]]
    proprio: Float[Tensor, "b s1 p"]
    action: Float[Tensor, "b s a"]
    mask: Bool[Tensor, "b s"]
    """The step was recorded, not padded."""
    instruction: Sequence[str]
    source: Sequence[Source]
    aftermath: Bool[Tensor, "b s"]
    """The step came after its episode was decided: nothing to imitate."""


def to_torch(values: Any, device: torch.device | str) -> Any:
    """A ``DecisionBatch`` (or any dataclass, mapping or tensor in one) with every tensor on ``device``."""
    if isinstance(values, Tensor):
        return values.to(device)
    if isinstance(values, Mapping):
        return {key: to_torch(value, device) for key, value in values.items()}
    if dataclasses.is_dataclass(values) and not isinstance(values, type):
        fields = {f.name: to_torch(getattr(values, f.name), device) for f in dataclasses.fields(values)}
        return type(values)(**fields)
    return values


def split_windows(batch: DecisionBatch, count: int) -> list[DecisionBatch]:
    """``count`` batches of consecutive windows, in order and as even as can be, without a copy of their tensors."""
    if count == 1:
        return [batch]
    borders = [len(batch.mask) * i // count for i in range(count + 1)]
    return [DecisionBatch(**{f.name: _cut(getattr(batch, f.name), slice(first, last))
                             for f in dataclasses.fields(batch)})
            for first, last in itertools.pairwise(borders)]


def _cut(values: Any, windows: slice) -> Any:
    return {key: value[windows] for key, value in values.items()} if isinstance(values, Mapping) else values[windows]
