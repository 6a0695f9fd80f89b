"""How good the world model is on episodes it was not fitted on, against baselines that know nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from data.store import ReplayStore
from data.text import tokenize
from data.types import Success, UserError
from world_model.pipeline import WorldModelPipeline
from world_model.rollout import Imagined, accumulate, open_loop, read_context
from world_model.success import SuccessModel
from world_model.training import stack_cameras

HORIZONS = (1, 4, 8)


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
    """PSNR in dB and SSIM at 1, 4 and 8 steps with the true actions, a copy of the last frame, and shuffled actions.

    Also the mean absolute error of proprio in standard deviations, against a copy, and the rank correlation of the
    model's own ``error`` with the error made. PSNR is averaged over ``starts`` windows, all with 8 steps to come.
    """
    horizon = HORIZONS[-1]
    places = [(e, step) for e in episodes for step in range(int(store.episodes.length[e]) - horizon + 1)]
    if len(places) < 2:
        raise UserError(f"evaluating the world model needs two episodes of {horizon} steps or more; collect some")
    rng = np.random.Generator(np.random.Philox(key=[seed, len(places)]))
    chosen = [places[i] for i in rng.choice(len(places), min(starts, len(places)), replace=False)]
    contexts = [read_context(store, episode, step, context) for episode, step in chosen]
    actions = torch.from_numpy(np.stack([store.column(e, "action")[s : s + horizon] for e, s in chosen]))
    instruction = [str(store.episodes.instruction[episode]) for episode, _ in chosen]
    truth = torch.stack([_frames(store, e, range(s + 1, s + horizon + 1)) for e, s in chosen])
    proprio = torch.from_numpy(np.stack([store.column(e, "proprio")[s + 1 : s + horizon + 1] for e, s in chosen]))

    def imagine(actions: Tensor) -> Imagined:
        return open_loop(
            pipeline,
            contexts,
            actions,
            instruction,
            generator=torch.Generator().manual_seed(seed),
            inference_steps=inference_steps,
        )

    true, shuffled = imagine(actions), imagine(actions.roll(len(actions) // 2 or 1, dims=0))
    copied = torch.stack([each.frames[-1] for each in contexts])[:, None].expand_as(truth)
    last = torch.stack([each.proprio[-1] for each in contexts])[:, None]
    scale = pipeline.unet.scale.cpu()
    result = {}
    for h in HORIZONS:
        for name, frames in (("model", true.frames), ("copy", copied), ("shuffled", shuffled.frames)):
            result[f"psnr_{name}_{h}"] = _psnr(frames[:, h - 1], truth[:, h - 1]).mean().item()
            result[f"ssim_{name}_{h}"] = _ssim(frames[:, h - 1], truth[:, h - 1])
        result[f"proprio_model_{h}"] = ((true.proprio - proprio)[:, h - 1].abs() / scale).mean().item()
        result[f"proprio_copy_{h}"] = ((last - proprio[:, h - 1 : h])[:, 0].abs() / scale).mean().item()
        made = -_psnr(true.frames[:, h - 1], truth[:, h - 1])
        result[f"error_rank_correlation_{h}"] = _rank_correlation(accumulate(true.error[:, :h]), made)
        moved = -_psnr(true.frames[:, h - 1], copied[:, 0])
        result[f"motion_rank_correlation_{h}"] = _rank_correlation(moved, made)
    return result


def evaluate_success(
    store: ReplayStore, model: SuccessModel, *, episodes: Sequence[int], device: torch.device
) -> dict[str, float]:
    """AUROC, Brier score and calibration error (10 bins) on every frame of the episodes whose outcome is known."""
    probabilities, labels = [], []
    for episode in episodes:
        success, length = store.episodes.success[episode], int(store.episodes.length[episode])
        if success == Success.UNKNOWN.value:
            continue
        tokens = torch.tensor([tokenize(str(store.episodes.instruction[episode]))] * (length + 1), device=device)
        frames = _frames(store, episode, range(length + 1))
        with torch.inference_mode():
            probabilities.append(model(frames.to(device), tokens).cpu())
        label = torch.zeros(length + 1, dtype=torch.long)
        label[-1] = int(success == Success.YES.value and bool(store.column(episode, "terminated")[length - 1]))
        labels.append(label)
    if not labels:
        return {}
    p, y = torch.cat(probabilities), torch.cat(labels)
    result = {"success_brier": (p - y).square().mean().item(), "success_frames": float(y.sum())}
    bins = (p * 10).long().clamp(max=9)
    gaps = [(p - y)[bins == i].sum().abs() / len(p) for i in bins.unique()]
    result["success_ece"] = float(sum(gaps))
    if 0 < y.sum() < len(y):
        result["success_auroc"] = binary_auroc(p, y).item()
    return result


def _frames(store: ReplayStore, episode: int, rows: range) -> Tensor:
    cameras = store.spec.cameras
    frames = {c: torch.from_numpy(store.column(episode, f"rgb_{c}")[rows.start : rows.stop].copy()) for c in cameras}
    return stack_cameras(frames, cameras)


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(a.float() / 255, b.float() / 255, strict=True)
    return torch.stack([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs]).clamp(max=60)


def _ssim(a: Tensor, b: Tensor) -> float:
    value = structural_similarity_index_measure(a.float() / 255, b.float() / 255, data_range=1.0)
    assert isinstance(value, Tensor)
    return value.item()


def _rank_correlation(a: Tensor, b: Tensor) -> float:
    value = float(spearmanr(a.numpy(), b.numpy()).statistic)
    return value if np.isfinite(value) else 0.0
