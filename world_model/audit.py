"""Imagination held against what was just recorded: the same actions from the same states, in the model and outside.

The policy that is being trained drives the data away from what the model was fitted on, so an audit looks at its newest
episodes, which no fit has seen. It is the one place that says how wrong imagination is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from data.store import ReplayStore
from world_model.evaluation import claims, judge_imagined, psnr
from world_model.pipeline import WorldModelPipeline
from world_model.rollout import accumulate, open_loop, read_windows
from world_model.success import SuccessModel

KEPT = 0.7
"""Share of the counts that an audit keeps of those before it: about the last three audits speak."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Successes that imagination claims beside those that were recorded, over the last audits."""

    imagined: float = 0.0
    recorded: float = 0.0

    @property
    def ratio(self) -> float:
        """Imagined over recorded; one of each is added, so that nothing counted is a ratio of 1."""
        return (self.imagined + 1) / (self.recorded + 1)

    def update(self, audit: Mapping[str, float]) -> Drift:
        """After another audit."""
        return Drift(imagined=KEPT * self.imagined + audit["audit/imagined_successes"],
                     recorded=KEPT * self.recorded + audit["audit/recorded_successes"])

    def within(self, limit: float) -> bool:
        """Imagination may go on."""
        return 1 / limit <= self.ratio <= limit


def audit(
    store: ReplayStore, pipeline: WorldModelPipeline, success: SuccessModel, *, episodes: Sequence[int], horizon: int,
    threshold: float, success_frames: int, seed: int, inference_steps: int,
) -> dict[str, float]:
    """Roll the last ``horizon`` recorded actions of each episode out in the model and compare.

    Successes are windows in which one was seen, in the model and in the recording. ``audit/psnr`` and
    ``audit/psnr_copy`` are of the last frame, in dB; ``audit/uncertainty`` is the model's own estimate for it.
    """
    places = [(e, max(0, int(store.episodes.length[e]) - horizon)) for e in episodes]
    windows = read_windows(store, places, context=pipeline.denoiser.config["context"], horizon=horizon)
    imagined = open_loop(
        pipeline, windows.contexts, windows.action, windows.instruction,
        generator=torch.Generator().manual_seed(seed), inference_steps=inference_steps)
    probability = judge_imagined(success, windows, imagined)
    seen = claims(probability, windows, threshold=threshold, success_frames=success_frames)
    rows, last = torch.arange(len(places)), windows.mask.sum(1) - 1
    truth, shown = windows.frames[rows, last], imagined.frames[rows, last]
    copied = torch.stack([context.frames[-1] for context in windows.contexts])
    uncertainty = torch.stack([accumulate(imagined.error[i : i + 1, : int(n) + 1])[0] for i, n in enumerate(last)])
    return {"audit/imagined_successes": float(seen.any(1).sum()),
            "audit/recorded_successes": float(windows.done.any(1).sum()),
            "audit/windows": float(len(places)),
            "audit/psnr": psnr(shown, truth).mean().item(), "audit/psnr_copy": psnr(copied, truth).mean().item(),
            "audit/uncertainty": uncertainty.mean().item()}
