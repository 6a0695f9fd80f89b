"""A call of imagination as a diffusers pipeline: context and actions in, the next frames and proprio out.

Axes as in ``model``: frames are ``uint8 [b, t, c, h, w]`` with ``c`` = 3 times the cameras, in the store's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.utils import BaseOutput
from jaxtyping import Float, UInt8
from torch import Tensor

from data.text import tokenize
from world_model.codec import codec_of
from world_model.model import Prediction, VideoModel
from world_model.process import OBJECTIVES, Edm, Flow, Process, Scheduler


@dataclass
class WorldModelOutput(BaseOutput):
    """The next ``k`` control steps."""

    frames: UInt8[Tensor, "b k c h w"]
    proprio: Float[Tensor, "b k p"]
    error: Float[Tensor, "b k"]
    """Expected error of each frame over the error typical of one step on the training data; about 1."""


class WorldModelPipeline(DiffusionPipeline):
    """A video model sampled by its noise process's scheduler, or asked once without noise (``regression``).

    With one step the answer is the denoiser's at the largest noise, that is the mean of the possible next frames.
    """

    denoiser: VideoModel
    scheduler: Scheduler
    vae: AutoencoderKL | None
    _optional_components = ["vae"]  # noqa: RUF012 # diffusers' idiom

    def __init__(
        self, denoiser: VideoModel, scheduler: Scheduler, vae: AutoencoderKL | None = None, objective: str = "edm",
        offset_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"expected an objective of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae)
        self.register_to_config(objective=objective, offset_noise=offset_noise)

    @property
    def process(self) -> Process:
        """The noise process that the scheduler samples."""
        if self.config["objective"] == "flow":
            return Flow()
        settings = self.scheduler.config
        return Edm(sigma_data=settings["sigma_data"], sigma_max=settings["sigma_max"])

    @torch.inference_mode()
    def __call__(
        self,
        context_frames: UInt8[Tensor, "b t c h w"],
        actions: Float[Tensor, "b m a"],
        context_proprio: Float[Tensor, "b t p"],
        instruction: Sequence[str],
        generator: torch.Generator | Sequence[torch.Generator],
        num_inference_steps: int = 1,
        context_noise: float | Float[Tensor, " b"] = 0.0,
    ) -> WorldModelOutput:
        """Predict ``denoiser.chunk`` steps; ``actions`` are those between the context frames and those to come.

        One ``generator``, or one per row; on the CPU, so that every device draws the same noise.
        ``context_noise`` is the noise level that the model is told its context has, 0 for recorded frames; one for
        all rows or one per row.
        """
        if num_inference_steps < 1:
            raise ValueError(f"expected num_inference_steps of at least 1, got {num_inference_steps}")
        device, codec = self.device, codec_of(self.vae)
        context = codec.encode(context_frames.to(device))
        tokens = torch.tensor([tokenize(text) for text in instruction], device=device).reshape(len(context), -1)
        level = torch.as_tensor(context_noise, dtype=torch.float32, device=device).expand(len(context))
        given = (context, actions.to(device), context_proprio.to(device), tokens, level)
        shape = torch.Size((len(context), self.denoiser.chunk, *context.shape[2:]))
        noise = start_noise(shape, generator, self.config["offset_noise"])
        prediction = self._predict(noise.to(device), num_inference_steps, *given)
        error = prediction.error / self.denoiser.typical_error
        return WorldModelOutput(frames=codec.decode(prediction.frames), proprio=prediction.proprio, error=error)

    @torch.no_grad()
    def denoise(self, noise: Float[Tensor, "b k c h w"], steps: int, *given: Tensor) -> Float[Tensor, "b k c h w"]:
        """Sample from this noise in the model's own space: what a student learns from."""
        return self._predict(noise, steps, *given).frames

    def _predict(self, noise: Tensor, steps: int, *given: Tensor) -> Prediction:
        if self.config["objective"] == "regression" or steps == 1:
            process = None if self.config["objective"] == "regression" else self.process
            return one_step(self.denoiser, process, noise, *given)
        return self._sample(noise, steps, *given)

    def _sample(self, sample: Tensor, steps: int, *given: Tensor) -> Prediction:
        self.scheduler.set_timesteps(steps)
        scheduler, process = self.scheduler, self.process
        sample = sample * (scheduler.init_noise_sigma if isinstance(scheduler, EDMEulerScheduler) else 1.0)
        first = None
        for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            prediction = self.denoiser(sample, process.scales(sigma.to(sample.device).expand(len(sample))), *given)
            first = first or prediction  # whose proprio and error are those that were trained
            if isinstance(scheduler, EDMEulerScheduler):
                scheduler.scale_model_input(sample, time)  # the model scales by itself; the scheduler insists
                sample = scheduler.step(
                    prediction.frames, time, sample, pred_original_sample=prediction.frames, return_dict=False
                )[0]
            else:
                velocity: Any = (sample - prediction.frames) / sigma
                sample = scheduler.step(velocity, time, cast(Any, sample), return_dict=False)[0]
        assert first is not None
        return Prediction(frames=sample, proprio=first.proprio, error=first.error)


def one_step(
    denoiser: VideoModel, process: Process | None, noise: Float[Tensor, "b k c h w"], *given: Tensor
) -> Prediction:
    """Ask ``denoiser`` once, from noise alone; ``process`` None: a regression, without noise.

    ``given``: context, actions, proprio, tokens and level, as ``VideoModel.forward`` takes them.
    """
    levels = (process or Edm()).start(len(noise)).to(given[0].device)
    noise = noise.to(given[0].device)
    nothing = torch.zeros_like(noise)
    noisy = nothing if process is None else process.mix(nothing, noise, levels[:, None, None, None, None])
    return denoiser(noisy, (process or Edm()).scales(levels), *given)


def start_noise(
    shape: torch.Size, generator: torch.Generator | Sequence[torch.Generator], offset: float
) -> Float[Tensor, "b *k c h w"]:
    """Unit noise from one generator, or one per row, plus ``offset`` times noise that a channel's pixels share."""
    if isinstance(generator, torch.Generator):
        noise = torch.randn(shape, generator=generator)
        return noise + offset * torch.randn((*shape[:-2], 1, 1), generator=generator) if offset else noise
    if len(generator) != shape[0]:
        raise ValueError(f"expected one generator or {shape[0]}, one per row, got {len(generator)}")
    return torch.cat([start_noise(torch.Size((1, *shape[1:])), each, offset) for each in generator])
