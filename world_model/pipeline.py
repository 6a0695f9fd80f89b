"""One control step of imagination as a diffusers pipeline: context and action in, next frame and proprio out.

Axes as in ``model``: frames are ``uint8 [b, t, c, h, w]`` with ``c`` = 3 times the cameras, in the store's order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.utils import BaseOutput
from jaxtyping import Float, UInt8
from torch import Tensor

from data.text import tokenize
from world_model.model import ActionUNet

OBJECTIVES = ("edm", "regression")


@dataclass
class WorldModelOutput(BaseOutput):
    """The next control step."""

    frames: UInt8[Tensor, "b c h w"]
    proprio: Float[Tensor, "b p"]
    error: Float[Tensor, " b"]
    """Expected error of the frame over the error typical of one step on the training data; about 1."""


class WorldModelPipeline(DiffusionPipeline):
    """``ActionUNet`` sampled by ``EDMEulerScheduler``, or asked once without noise (``objective="regression"``).

    With one step the answer is the denoiser's at the largest noise, that is the mean of the possible next frames.
    """

    unet: ActionUNet
    scheduler: EDMEulerScheduler

    def __init__(self, unet: ActionUNet, scheduler: EDMEulerScheduler, objective: str = "edm") -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"expected an objective of {', '.join(OBJECTIVES)}, got {objective!r}")
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(objective=objective)

    @torch.inference_mode()
    def __call__(
        self,
        context_frames: UInt8[Tensor, "b t c h w"],
        context_actions: Float[Tensor, "b t a"],
        context_proprio: Float[Tensor, "b t p"],
        instruction: Sequence[str],
        generator: torch.Generator | Sequence[torch.Generator],
        num_inference_steps: int = 1,
        context_noise: float | Float[Tensor, " b"] = 0.0,
    ) -> WorldModelOutput:
        """Predict one step. One ``generator``, or one per row; on the CPU, so that every device draws the same noise.

        ``context_noise`` is the noise level that the model is told its context has, 0 for recorded frames; one for
        all rows or one per row.
        """
        if num_inference_steps < 1:
            raise ValueError(f"expected num_inference_steps of at least 1, got {num_inference_steps}")
        unet, device = self.unet, self.device
        context = to_pixels(context_frames.to(device))
        tokens = torch.tensor([tokenize(text) for text in instruction], device=device).reshape(len(context), -1)
        level = torch.as_tensor(context_noise, dtype=torch.float32, device=device).expand(len(context))
        given = (context, context_actions.to(device), context_proprio.to(device), tokens, level)
        sample = self._noise(context[:, -1].shape, generator).to(device)
        if self.config["objective"] == "regression":
            sigma = torch.full((len(context),), self.scheduler.config["sigma_max"], device=device)
            prediction = unet(torch.zeros_like(sample), sigma, *given)
        else:
            self.scheduler.set_timesteps(num_inference_steps)
            sample = sample * self.scheduler.init_noise_sigma
            for time, sigma in zip(self.scheduler.timesteps, self.scheduler.sigmas, strict=False):
                self.scheduler.scale_model_input(sample, time)  # the U-Net scales by itself; the scheduler insists
                prediction = unet(sample, sigma.to(device).expand(len(sample)), *given)
                denoised = prediction.frame
                sample = self.scheduler.step(
                    denoised, time, sample, pred_original_sample=denoised, return_dict=False
                )[0]
            prediction = type(prediction)(frame=sample, proprio=prediction.proprio, error=prediction.error)
        error = prediction.error / unet.typical_error
        return WorldModelOutput(frames=to_bytes(prediction.frame), proprio=prediction.proprio, error=error)

    def _noise(self, shape: torch.Size, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
        if isinstance(generator, torch.Generator):
            return torch.randn(shape, generator=generator)
        if len(generator) != shape[0]:
            raise ValueError(f"expected one generator or {shape[0]}, one per row, got {len(generator)}")
        return torch.stack([torch.randn(shape[1:], generator=each) for each in generator])


def to_pixels(frames: UInt8[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """Bytes to [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_bytes(pixels: Float[Tensor, "*b"]) -> UInt8[Tensor, "*b"]:
    """[-1, 1] to bytes, rounded: what a context made of predictions is quantised to, as recorded frames are."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
