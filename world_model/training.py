"""What fits the video model from the replay store with Lightning, and what any fit here shares.

Step ``i`` draws its batch and its noise from ``(seed, i)`` alone, so a fit that was cut in two ends where one that was
not ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.sampler import StepSampler
from data.store import ReplayStore
from data.text import tokenize
from world_model.codec import codec_of
from world_model.config import WorldModelConfig
from world_model.frames import stack_cameras, to_pixels
from world_model.model import ActionUNet, Prediction, VideoModel
from world_model.pipeline import WorldModelPipeline, start_noise
from world_model.self_rollout import SelfRollout

VIDEO_STREAM, SUCCESS_STREAM, AUTOENCODER_STREAM = 11, 12, 13
PROPRIO_WEIGHT = 1.0
ERROR_WEIGHT = 0.1
VAE_KL = 1e-6
TYPICAL_ERROR_DECAY = 0.98

Batch = dict[str, Any]
Log = Callable[[int, Mapping[str, float]], None]


def learning_rate(config: WorldModelConfig, step: int) -> float:
    """Rise over ``warmup``, hold, fall over the second half of the first fit to what later fits keep.

    Later fits at the peak rate sometimes diverged (docs/benchmarks.md).
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = min(1.0, max(0.0, 2 * step / max(1, config.steps) - 1))
    return rise * (config.learning_rate + fall * (config.round_learning_rate - config.learning_rate))


class VideoModule(lightning.LightningModule):
    """Fits a ``VideoModel``: its denoising loss, next proprio, and the size of its own error."""

    def __init__(
        self, config: WorldModelConfig, model: VideoModel, seed: int, *, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        self.vae, self.codec = vae, codec_of(vae)  # a module of this one, so that it moves to its device
        self.teacher: WorldModelPipeline | None = None
        """Distilling: what the targets are sampled from."""
        self.config, self.seed, self.process = config, seed, config.process()
        if isinstance(model, ActionUNet):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg] # diffusers wraps ``to``
        self.denoiser: VideoModel = model
        self.average: VideoModel = copy.deepcopy(model)
        self.average.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.denoiser.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.rollout = SelfRollout(
            context=config.context, chunk=config.chunk, calls=config.imagined_steps // config.chunk + 1)
        self.steps = 0
        self.log_to: Log | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Hand over the same optimiser in every fit, so its moments live on."""
        return self.optimizer

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of the batch of step ``self.steps``."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.steps)
        prediction, target, target_proprio, sigma, one_step = self._predict(batch)
        error = (prediction.frames - target).square().mean((2, 3, 4))
        weight = torch.ones_like(sigma) if config.objective == "regression" else self.process.weight(sigma)
        gap = (prediction.proprio - target_proprio) / self.denoiser.scale
        proprio = gap.square().mean()
        root = error.detach().sqrt().clamp(min=1e-4)
        calibration = ((prediction.error.log() - root.log()).square() * one_step[:, None]).mean()
        frame = (weight[:, None] * error).mean()
        self._note_typical_error(root[one_step.bool()])
        report = {"loss": frame, "rmse": root.mean() / 2, "proprio_loss": proprio}
        if self.log_to is not None:
            self.log_to(self.steps, {f"world_model/{name}": float(value.detach()) for name, value in report.items()})
        return frame + PROPRIO_WEIGHT * proprio + ERROR_WEIGHT * calibration

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; the Trainer's own clipping refuses fused optimisers."""
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.config.clip)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Count the step and move the averaged weights."""
        self.steps += 1
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.denoiser.parameters()), 1 - decay)
            for average, latest in zip(self.average.buffers(), self.denoiser.buffers(), strict=True):
                average.copy_(latest)

    def _predict(self, batch: Batch) -> tuple[Prediction, Tensor, Tensor, Tensor, Tensor]:
        """Prediction, its targets ``[b, k, c, h, w]`` and ``[b, k, p]``, noise level ``[b]``, which rows are at start.

        The generator's order of draws is part of what makes a fit reproducible.
        """
        config, generator = self.config, keyed_generator(self.seed, self.steps, VIDEO_STREAM)
        order = torch.randperm(len(batch["frames"]), generator=generator)  # a batch is sorted by source
        going_on = order[: round(config.rollout_share * len(order))] if config.imagined_steps else order[:0]
        frames, proprio, action, tokens = self._windows(batch, going_on)
        context, target = frames[:, : config.context], frames[:, config.context :]
        level = config.context_noise * torch.rand(len(order), generator=generator).to(target.device)
        noise = torch.randn(context.shape, generator=generator).to(target.device)
        context = context + level[:, None, None, None, None] * noise
        given = context, action, proprio[:, : config.context], tokens, level
        at_start = torch.rand(len(order), generator=generator) < config.start_share
        at_start[going_on] = True
        levels = self.process.levels(torch.randn(len(order), generator=generator))
        noise = start_noise(target.shape, generator, config.offset_noise).to(target.device)
        if self.teacher is not None:
            target = self.teacher.denoise(noise, config.teacher_steps, *given)
        if config.objective == "regression" or self.teacher is not None:
            at_start = torch.ones_like(at_start)
        sigma = torch.where(at_start, self.process.start(len(order)), levels).to(target.device)
        if config.objective == "regression":
            noisy = torch.zeros_like(target)
        else:
            noisy = self.process.mix(target, noise, sigma[:, None, None, None, None])
        prediction = self.denoiser(noisy, self.process.scales(sigma), *given)
        if len(going_on):
            self.rollout.paint(prediction.frames[going_on], prediction.proprio[going_on], self.codec)
        return prediction, target, proprio[:, config.context :], sigma, at_start.to(target.device)

    def _windows(self, batch: Batch, going_on: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames and proprio ``[b, context + k, …]``, actions and tokens: recorded, but for the rows ``going_on``."""
        recorded = {name: batch[name] for name in ("proprio", "action", "tokens")}
        recorded["frames"] = self.codec.encode(batch["frames"])
        seen = self.config.imagined_steps
        frames, proprio, action = (recorded[name][:, seen:].clone() for name in ("frames", "proprio", "action"))
        tokens = recorded["tokens"].clone()
        if len(going_on):
            first = batch["first"].cpu()[going_on]
            self.rollout.renew({name: values[going_on] for name, values in recorded.items()}, first)
            frames[going_on], proprio[going_on], action[going_on] = self.rollout.given()
            tokens[going_on] = self.rollout.window["tokens"]
        return frames, proprio, action, tokens

    def _note_typical_error(self, root: Tensor) -> None:
        """Keep a running mean of the error at the start of sampling: the unit of ``WorldModelOutput.error``."""
        if root.numel():
            decay = min(TYPICAL_ERROR_DECAY, self.steps / (self.steps + 1))
            self.denoiser.typical_error.lerp_(root.mean(), 1 - decay)


class AutoencoderModule(lightning.LightningModule):
    """Fits ``AutoencoderKL`` on recorded frames: absolute and squared error, and a faint pull towards a unit normal."""

    def __init__(self, config: WorldModelConfig, vae: AutoencoderKL, seed: int) -> None:
        super().__init__()
        self.config, self.vae, self.seed = config, vae, seed
        self.optimizer = torch.optim.AdamW(vae.parameters(), lr=config.vae_learning_rate)
        self.steps = 0
        self.log_to: Log | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Hand over the optimiser."""
        return self.optimizer

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Reconstruct every frame of the windows, camera by camera."""
        pixels = to_pixels(batch["frames"]).reshape(-1, 3, *batch["frames"].shape[-2:])
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample(keyed_generator(self.seed, self.steps, AUTOENCODER_STREAM))
        gap = self.vae.decode(latents, return_dict=False)[0] - pixels
        loss = gap.abs().mean() + gap.square().mean() + VAE_KL * posterior.kl().mean()
        if self.log_to is not None:
            self.log_to(self.steps, {"world_model/vae_rmse": float(gap.detach().square().mean().sqrt()) / 2})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Count the step."""
        self.steps += 1


class VideoSampler:
    """``StepSampler``'s windows as the video model's batches."""

    def __init__(self, store: ReplayStore, config: WorldModelConfig, seed: int) -> None:
        self.cameras, self.context = store.spec.cameras, config.context
        self.steps = StepSampler(
            store, sources=config.sources, context=config.context + config.imagined_steps, horizon=config.chunk,
            seed=seed)

    def sample(self, step: int, batch: int) -> Batch:
        """``frames uint8 [b, s+1, c, h, w]``, ``proprio [b, s+1, p]``, ``action [b, s, a]``, ``tokens [b, l]``.

        ``first int64 [b]``: the first frame of a context whose next step was recorded and is no padding.
        """
        drawn = self.steps.sample(step, batch)
        tokens = torch.tensor([tokenize(text) for text in drawn.instruction])
        frames = stack_cameras(drawn.frames, self.cameras)
        padding = (~drawn.mask).int().cumprod(1).sum(1)
        first = (padding - (self.context - 1)).clamp(min=0)
        return {"frames": frames, "proprio": drawn.proprio, "action": drawn.action, "tokens": tokens, "first": first}


class Sampler(Protocol):
    """Numbered batches."""

    def sample(self, step: int, batch: int) -> Batch:
        """Batch number ``step`` of ``batch`` rows."""
        ...


class StoreDataModule(lightning.LightningDataModule):
    """Batches ``first .. first + steps - 1`` of a sampler."""

    def __init__(self, sampler: Sampler, *, first: int, steps: int, batch: int) -> None:
        super().__init__()
        self.batches = _Batches(sampler, range(first, first + steps), batch)

    def train_dataloader(self) -> DataLoader:
        """Whole batches in the order of their steps."""
        return DataLoader(self.batches, batch_size=None, num_workers=0)


class _Batches(IterableDataset):
    def __init__(self, sampler: Sampler, steps: range, batch: int) -> None:
        self.sampler, self.steps, self.batch = sampler, steps, batch

    def __iter__(self) -> Iterator[Batch]:
        return (self.sampler.sample(step, self.batch) for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def keyed_generator(*key: int) -> torch.Generator:
    """Make a CPU generator that depends on all of ``key``; hashed, so that neighbours share nothing."""
    state = np.random.SeedSequence([value % 2**64 for value in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def fit(
    module: lightning.LightningModule, data: StoreDataModule, *, precision: str, device: torch.device
) -> None:
    """Run the Lightning Trainer once over ``data``, writing no files."""
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=precision,  # type: ignore[arg-type] # checked by the config
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
