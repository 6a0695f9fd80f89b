"""How good a world model is on episodes it was not fitted on, against baselines that know nothing.

Every number is a key of one flat dictionary, ``<measure>_<what>_<horizon>``, so that seeds can be averaged and tables
and JSON be written without knowing what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error
from torchmetrics.functional.image import structural_similarity_index_measure

from data.store import ReplayStore
from data.types import Success, UserError
from world_model.pipeline import WorldModelPipeline
from world_model.rollout import Imagined, Windows, accumulate, decided_at, open_loop, outcome, read_windows
from world_model.success import SuccessModel
from world_model.success_training import recorded_pairs

HORIZONS = (1, 4, 8, 16)
"""Control steps after the last recorded frame."""

MOVED = 12
"""A pixel moved when a channel differs from the last recorded frame by more than this, of 255."""

BRIGHTEST = 255.0
BATCH = 64
"""Windows rolled out together."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Probabilities of success beside what was recorded."""

    probability: Float[Tensor, " n"]
    label: Bool[Tensor, " n"]

    def measures(self, name: str) -> dict[str, float]:
        """AUROC, Brier score, calibration error (ten bins of equal width), and how many frames show success."""
        p, y = self.probability, self.label.long()
        result = {f"success_brier_{name}": (p - y).square().mean().item(), f"success_frames_{name}": float(y.sum()),
                  f"success_ece_{name}": binary_calibration_error(p, y, n_bins=10, norm="l1").item()}
        if 0 < y.sum() < len(y):
            result[f"success_auroc_{name}"] = binary_auroc(p, y).item()
        return result


def evaluate_video(
    store: ReplayStore,
    pipeline: WorldModelPipeline,
    *,
    episodes: Sequence[int],
    starts: int,
    seed: int,
    context: int,
    inference_steps: int,
) -> dict[str, float]:
    """Open-loop quality with the recorded actions, and what is left of it with others.

    At each of ``HORIZONS`` that two windows reach: ``psnr`` in dB and ``ssim`` (means over windows), ``psnr_moved``
    over the pixels that moved, for the ``model``, a ``copy`` of the last recorded frame, and the model with actions
    ``shuffled`` between windows or ``zero``. ``proprio``: mean absolute error in standard deviations. ``*_rank_
    correlation``: Spearman, over windows, of the error made with the model's own estimate and with the size of the
    motion that it imagined.
    """
    horizons = [h for h in HORIZONS if len(_places(store, episodes, h)) > 1]
    if not horizons:
        raise UserError("evaluating the world model needs episodes of at least 2 steps; collect some")
    horizon = horizons[-1]
    windows = read_windows(
        store, _choose(_places(store, episodes, horizon), starts, seed), context=context, horizon=horizon)

    def imagine(actions: Tensor) -> Imagined:
        return _roll(pipeline, windows, actions, seed=seed, inference_steps=inference_steps)

    true = imagine(windows.action)
    others = {"shuffled": imagine(windows.action.roll(len(windows.action) // 2 or 1, dims=0)),
              "zero": imagine(torch.zeros_like(windows.action))}
    last = torch.stack([each.frames[-1] for each in windows.contexts])
    proprio = torch.stack([each.proprio[-1] for each in windows.contexts])
    scale = pipeline.denoiser.scale.cpu()
    result: dict[str, float] = {}
    for h in horizons:
        truth = windows.frames[:, h - 1]
        moved = ((truth.int() - last.int()).abs() > MOVED).any(1, keepdim=True)
        frames = {"model": true.frames[:, h - 1], "copy": last, **{n: o.frames[:, h - 1] for n, o in others.items()}}
        for name, shown in frames.items():
            result[f"psnr_{name}_{h}"] = psnr(shown, truth).mean().item()
            result[f"ssim_{name}_{h}"] = ssim(shown, truth).mean().item()
            result[f"psnr_moved_{name}_{h}"] = _masked_psnr(shown, truth, moved)
        result[f"proprio_model_{h}"] = ((true.proprio - windows.proprio)[:, h - 1].abs() / scale).mean().item()
        result[f"proprio_copy_{h}"] = ((proprio - windows.proprio[:, h - 1]).abs() / scale).mean().item()
        made = -psnr(frames["model"], truth)
        result[f"error_rank_correlation_{h}"] = _rank_correlation(accumulate(true.error[:, :h]), made)
        result[f"motion_rank_correlation_{h}"] = _rank_correlation(-psnr(frames["model"], last), made)
    return result


def evaluate_success(
    store: ReplayStore, model: SuccessModel, *, episodes: Sequence[int], device: torch.device
) -> dict[str, float]:
    """AUROC, Brier score and calibration error on every recorded frame of the episodes whose outcome is known."""
    probabilities, labels = [], []
    for episode in episodes:
        if store.episodes.success[episode] == Success.UNKNOWN.value:
            continue
        shown, before = outcome(store, episode)
        known = np.flatnonzero(shown | before).tolist()
        pairs = recorded_pairs(store, episode, known)
        with torch.inference_mode():
            probabilities.append(model(*(part.to(device) for part in pairs)).cpu())
        labels.append(torch.from_numpy(shown[known]))
    return Judged(probability=torch.cat(probabilities), label=torch.cat(labels)).measures("real") if labels else {}


def evaluate_imagined_success(
    store: ReplayStore,
    pipeline: WorldModelPipeline,
    model: SuccessModel,
    *,
    episodes: Sequence[int],
    windows: int,
    horizon: int,
    threshold: float,
    success_frames: int,
    seed: int,
    context: int,
    inference_steps: int,
) -> dict[str, float]:
    """Whether success is seen in imagined frames where the simulator saw it, and nowhere else.

    Recorded actions are rolled out from ``windows`` uniformly drawn steps before the episode was decided, for up to
    ``horizon`` steps, as far as it was recorded: frames give AUROC, Brier and calibration error, and windows without
    success the share of ``false`` ones. From every successful episode one more window, which begins 1 to ``horizon``
    steps before its success, gives the share ``missed``, and how many steps the claim is off (absolute mean). A success
    is claimed where imagination would: in the last of ``success_frames`` frames of at least ``threshold``.
    """
    table = store.episodes
    known = [e for e in episodes if table.success[e] != Success.UNKNOWN.value]
    if not known:
        return {}
    rng = np.random.Generator(np.random.Philox(key=[seed, len(known)]))
    ends = [(e, max(0, decided_at(store, e) - int(rng.integers(1, horizon + 1))))
            for e in known if table.success[e] == Success.YES.value]
    uniform = _choose([(e, step) for e in known for step in range(decided_at(store, e))], windows, seed)
    result: dict[str, float] = {}
    for places, ending in ((uniform, False), (ends, True)):
        if not places:
            continue
        window = read_windows(store, places, context=context, horizon=horizon)
        imagined = _roll(pipeline, window, window.action, seed=seed, inference_steps=inference_steps)
        probability = judge_imagined(model, window, imagined)
        seen = claims(probability, window, threshold=threshold, success_frames=success_frames)
        if not ending:
            flat = Judged(probability=probability[window.known], label=window.done[window.known])
            result |= flat.measures("imagined")
            without = ~window.done.any(1)
            result["success_false"] = seen[without].any(1).float().mean().item()
            result["success_false_windows"] = float(without.sum())
            continue
        over = window.done.any(1)  # a success that did not end its episode shows no frame of it
        if not over.any():
            continue
        hit = seen.any(1)
        result["success_missed"] = (~hit[over]).float().mean().item()
        result["success_missed_windows"] = float(over.sum())
        both = hit & over
        if both.any():
            off = seen[both].float().argmax(1) - window.done[both].float().argmax(1)
            result["success_onset_off"] = off.abs().float().mean().item()
    return result


def claims(
    probability: Float[Tensor, "b s"], windows: Windows, *, threshold: float, success_frames: int
) -> Bool[Tensor, "b s"]:
    """Where imagination claims success: ``success_frames`` frames in a row, up to this one, of at least ``threshold``.

    A recording that shows fewer frames of its success cannot confirm it for longer; there as many are enough.
    """
    shown = windows.done.sum(1)
    needed = torch.where(shown > 0, shown.clamp(max=success_frames), success_frames)
    counts = (probability >= threshold) & windows.mask
    streaks = torch.zeros(len(counts), counts.shape[1] + 1, dtype=torch.long)
    for i in range(counts.shape[1]):
        streaks[:, i + 1] = (streaks[:, i] + 1) * counts[:, i]
    return streaks[:, 1:] >= needed[:, None]


@torch.inference_mode()
def judge_imagined(model: SuccessModel, windows: Windows, imagined: Imagined) -> Float[Tensor, "b s"]:
    """Probability of success in every imagined frame."""
    device = next(model.parameters()).device
    last = torch.stack([each.frames[-1] for each in windows.contexts])[:, None]
    proprio = torch.stack([each.proprio[-1] for each in windows.contexts])[:, None]
    frames, proprio = torch.cat([last, imagined.frames], 1), torch.cat([proprio, imagined.proprio], 1)
    tokens = windows.tokens().to(device)
    columns = [model(frames[:, i : i + 2].to(device), proprio[:, i : i + 2].to(device), tokens).cpu()
               for i in range(imagined.frames.shape[1])]
    return torch.stack(columns, 1)


def psnr(a: UInt8[Tensor, "b c h w"], b: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each pair in dB, at most 60."""
    error = (a.float() - b.float()).square().mean((1, 2, 3))
    return (10 * torch.log10(BRIGHTEST**2 / error.clamp(min=1e-9))).clamp(max=60)


def ssim(a: UInt8[Tensor, "b c h w"], b: UInt8[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each pair."""
    value = structural_similarity_index_measure(
        a.float() / BRIGHTEST, b.float() / BRIGHTEST, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value


def _masked_psnr(a: Tensor, b: Tensor, mask: Bool[Tensor, "b 1 h w"]) -> float:
    """Over the masked pixels of all pairs together; NaN where none is masked."""
    error = ((a.float() - b.float()).square().mean(1, keepdim=True) * mask).sum() / mask.sum()
    return (10 * torch.log10(BRIGHTEST**2 / error)).item()


def _places(store: ReplayStore, episodes: Sequence[int], horizon: int) -> list[tuple[int, int]]:
    """Every step that has ``horizon`` steps from it on."""
    return [(e, step) for e in episodes for step in range(int(store.episodes.length[e]) - horizon + 1)]


def _choose(places: Sequence[tuple[int, int]], number: int, seed: int) -> list[tuple[int, int]]:
    rng = np.random.Generator(np.random.Philox(key=[seed, len(places)]))
    return [places[i] for i in rng.choice(len(places), min(number, len(places)), replace=False)]


def _roll(
    pipeline: WorldModelPipeline, windows: Windows, actions: Tensor, *, seed: int, inference_steps: int
) -> Imagined:
    """Roll out in parts; a window's noise depends on its place among all."""
    parts = []
    for first in range(0, len(actions), BATCH):
        rows = slice(first, first + BATCH)
        parts.append(open_loop(
            pipeline, windows.contexts[rows], actions[rows], windows.instruction[rows],
            generator=torch.Generator().manual_seed(seed * 100_003 + first), inference_steps=inference_steps))
    return Imagined(frames=torch.cat([p.frames for p in parts]), proprio=torch.cat([p.proprio for p in parts]),
                    error=torch.cat([p.error for p in parts]))


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    value = float(spearmanr(a.numpy(), b.numpy()).statistic)
    return value if np.isfinite(value) else 0.0
