"""Lightning modules and the data module that fit the video model and the success model from the replay store.

Step ``i`` draws its batch and its noise from ``(seed, i)`` alone, so a fit that was cut in two ends where one that was
not ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data.sampler import StepSampler
from data.store import ReplayStore
from data.text import tokenize
from data.types import Success
from world_model.config import WorldModelConfig
from world_model.model import ActionUNet, Prediction
from world_model.pipeline import to_pixels
from world_model.success import SuccessModel, balanced_loss

VIDEO_STREAM, SUCCESS_STREAM = 11, 12
PROPRIO_WEIGHT = 1.0
ERROR_WEIGHT = 0.1
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
    """Fits ``ActionUNet``: EDM's denoising loss, next proprio, and the size of its own error."""

    def __init__(self, config: WorldModelConfig, unet: ActionUNet, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-arg] # diffusers wraps ``to``
        self.average = copy.deepcopy(self.unet).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
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
        prediction, target, sigma = self._predict(batch)
        error = (prediction.frame - target).square().mean((1, 2, 3))
        weight = (sigma**2 + config.sigma_data**2) / (sigma * config.sigma_data) ** 2
        proprio = ((prediction.proprio - batch["proprio"][:, -1]) / self.unet.scale).square().mean()
        root = error.detach().sqrt().clamp(min=1e-4)
        one_step = (sigma == config.sigma_max).float()
        calibration = ((prediction.error.log() - root.log()).square() * one_step).mean()
        frame = (weight * error).mean()
        self._note_typical_error(root, sigma)
        report = {"loss": frame, "rmse": root.mean() / 2, "proprio_loss": proprio}
        if self.log_to is not None:
            self.log_to(self.steps, {f"world_model/{name}": float(value.detach()) for name, value in report.items()})
        return frame + PROPRIO_WEIGHT * proprio + ERROR_WEIGHT * calibration

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; the Trainer's own clipping refuses fused optimisers."""
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.clip)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Count the step and move the averaged weights."""
        self.steps += 1
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), 1 - decay)
            for average, latest in zip(self.average.buffers(), self.unet.buffers(), strict=True):
                average.copy_(latest)

    def _predict(self, batch: Batch) -> tuple[Prediction, Tensor, Tensor]:
        """Noise the target and the context; returns the prediction, the target ``[b, c, h, w]`` and sigma ``[b]``."""
        config, frames = self.config, to_pixels(batch["frames"])
        context, target = frames[:, : config.context], frames[:, config.context]
        generator = keyed_generator(self.seed, self.steps, VIDEO_STREAM)
        rows = len(target)

        def draw(kind: Callable[..., Tensor], shape: torch.Size | tuple[int, ...]) -> Tensor:
            return kind(shape, generator=generator).to(target.device)

        level = config.context_noise * draw(torch.rand, (rows,))
        context = context + level[:, None, None, None, None] * draw(torch.randn, context.shape)
        sigma = torch.full_like(level, config.sigma_max)
        if config.objective == "edm":
            normal = torch.exp(config.sigma_log_mean + config.sigma_log_std * draw(torch.randn, (rows,)))
            sigma = torch.where(draw(torch.rand, (rows,)) < config.start_share, sigma, normal)
            noisy = target + sigma[:, None, None, None] * draw(torch.randn, target.shape)
        else:
            noisy = torch.zeros_like(target)
        proprio = batch["proprio"][:, : config.context]
        prediction = self.unet(noisy, sigma, context, batch["action"], proprio, batch["tokens"], level)
        return prediction, target, sigma

    def _note_typical_error(self, root: Tensor, sigma: Tensor) -> None:
        """Keep a running mean of the one-step error: the unit of ``WorldModelOutput.error``."""
        one_step = root[sigma == self.config.sigma_max]
        if len(one_step):
            decay = min(TYPICAL_ERROR_DECAY, self.steps / (self.steps + 1))
            self.unet.typical_error.lerp_(one_step.mean(), 1 - decay)


class SuccessModule(lightning.LightningModule):
    """Fits ``SuccessModel`` on frames of episodes whose outcome is known, half of them showing success."""

    def __init__(self, config: WorldModelConfig, model: SuccessModel) -> None:
        super().__init__()
        self.config = config
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg] # diffusers wraps ``to``
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.success_learning_rate, fused=True)
        self.steps = 0
        self.log_to: Log | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Hand over the same optimiser in every fit, so its moments live on."""
        return self.optimizer

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Class-balanced cross entropy."""
        loss = balanced_loss(self.model.balanced_logit(batch["frames"], batch["tokens"]), batch["label"])
        if self.log_to is not None:
            self.log_to(self.steps, {"world_model/success_loss": float(loss.detach())})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; the Trainer's own clipping refuses fused optimisers."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Count the step."""
        self.steps += 1


class SuccessSampler:
    """Frames of episodes with known success: every other one shows success, the rest are drawn among all others.

    A frame shows success when it is the last of a successful episode that terminated there (``StepBatch``).
    """

    def __init__(self, store: ReplayStore, *, sources: Mapping[str, float], seed: int) -> None:
        self.store, self.seed = store, seed
        episodes = store.episodes
        drawn = [name for name, weight in sources.items() if weight > 0]
        known = np.isin(episodes.source, drawn) & (episodes.success != Success.UNKNOWN.value)
        self.done: list[tuple[int, int]] = []
        self.not_done: list[tuple[int, int]] = []
        for index in np.flatnonzero(known).tolist():
            length = int(episodes.length[index])
            over = episodes.success[index] == Success.YES.value and bool(store.column(index, "terminated")[length - 1])
            self.not_done += [(index, step) for step in range(length + (not over))]
            self.done += [(index, length)] if over else []

    @property
    def usable(self) -> bool:
        """Both classes are present."""
        return bool(self.done and self.not_done)

    @property
    def prior(self) -> float:
        """Share of frames that show success."""
        return len(self.done) / (len(self.done) + len(self.not_done))

    def sample(self, step: int, batch: int) -> Batch:
        """``frames uint8 [b, c, h, w]``, ``tokens [b, l]``, ``label [b]``."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, SUCCESS_STREAM]))
        picks = [
            pool[rng.integers(len(pool))] for i in range(batch) for pool in [self.done if i % 2 == 0 else self.not_done]
        ]
        frames = {
            camera: torch.from_numpy(np.stack([self.store.column(e, f"rgb_{camera}")[step] for e, step in picks]))
            for camera in self.store.spec.cameras
        }
        tokens = [tokenize(str(self.store.episodes.instruction[episode])) for episode, _ in picks]
        label = torch.arange(batch) % 2 == 0
        pixels = stack_cameras(frames, self.store.spec.cameras)
        return {"frames": pixels, "tokens": torch.tensor(tokens), "label": label}


class VideoSampler:
    """``StepSampler``'s windows as the video model's batches."""

    def __init__(self, store: ReplayStore, config: WorldModelConfig, seed: int) -> None:
        self.cameras = store.spec.cameras
        self.steps = StepSampler(store, sources=config.sources, context=config.context, horizon=1, seed=seed)

    def sample(self, step: int, batch: int) -> Batch:
        """``frames uint8 [b, s+1, c, h, w]``, ``proprio [b, s+1, p]``, ``action [b, s, a]``, ``tokens [b, l]``."""
        drawn = self.steps.sample(step, batch)
        tokens = torch.tensor([tokenize(text) for text in drawn.instruction])
        frames = stack_cameras(drawn.frames, self.cameras)
        return {"frames": frames, "proprio": drawn.proprio, "action": drawn.action, "tokens": tokens}


class StoreDataModule(lightning.LightningDataModule):
    """Batches ``first .. first + steps - 1`` of a sampler."""

    def __init__(self, sampler: VideoSampler | SuccessSampler, *, first: int, steps: int, batch: int) -> None:
        super().__init__()
        self.batches = _Batches(sampler, range(first, first + steps), batch)

    def train_dataloader(self) -> DataLoader:
        """Whole batches in the order of their steps."""
        return DataLoader(self.batches, batch_size=None, num_workers=0)


class _Batches(IterableDataset):
    def __init__(self, sampler: VideoSampler | SuccessSampler, steps: range, batch: int) -> None:
        self.sampler, self.steps, self.batch = sampler, steps, batch

    def __iter__(self) -> Iterator[Batch]:
        return (self.sampler.sample(step, self.batch) for step in self.steps)

    def __len__(self) -> int:
        return len(self.steps)


def stack_cameras(frames: Mapping[str, Tensor], cameras: tuple[str, ...]) -> Tensor:
    """``uint8 [..., h, w, 3]`` per camera to ``uint8 [..., c, h, w]``, cameras in the spec's order."""
    return torch.cat([frames[camera] for camera in cameras], dim=-1).movedim(-1, -3).contiguous()


def split_cameras(frames: Tensor, cameras: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Inverse of ``stack_cameras``, as NumPy copies."""
    last = frames.movedim(-3, -1).cpu()
    return {camera: last[..., 3 * i : 3 * i + 3].contiguous().numpy() for i, camera in enumerate(cameras)}


def keyed_generator(*key: int) -> torch.Generator:
    """Make a CPU generator that depends on all of ``key``; hashed, so that neighbours share nothing."""
    state = np.random.SeedSequence([value % 2**64 for value in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def fit(
    module: lightning.LightningModule, data: StoreDataModule, *, config: WorldModelConfig, device: torch.device
) -> None:
    """Run the Lightning Trainer once over ``data``, writing no files."""
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=config.precision,  # type: ignore[arg-type] # checked by the config
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
