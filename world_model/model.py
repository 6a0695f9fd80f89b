"""The video models' common shape, and the diffusers U-Net that denoises the next frame.

Axes: ``b`` batch, ``t`` context steps, ``k`` steps that are predicted, ``m`` = ``t - 1 + k`` actions, ``c`` cameras
times channels (cameras are stacked), ``h w`` pixels, ``a`` action dimensions, ``p`` proprio dimensions, ``l`` tokens.
Pixels are in [-1, 1]. Action ``i`` leads from frame ``i`` to frame ``i + 1``, context and predicted frames counted
together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from world_model.process import Scales

NOISE_EMBEDDING_SCALE = 10.0
"""Stretches ``Scales.noise``, which is of order 1, over the sinusoids of the U-Net's time embedding."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says of the next ``k`` control steps."""

    frames: Float[Tensor, "b k c h w"]
    """Denoised, float32: about [-1, 1], or latents of about unit size."""
    proprio: Float[Tensor, "b k p"]
    """In the robot's units."""
    error: Float[Tensor, "b k"]
    """Expected root mean square error of each frame, in the units of ``frames``."""


class VideoModel(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers' idiom
    """A denoiser of the next ``chunk`` frames given past frames, actions, proprio and a sentence."""

    shift: Tensor
    scale: Tensor
    typical_error: Tensor

    @property
    def chunk(self) -> int:
        """Frames per call."""
        return 1

    def forward(
        self,
        noisy: Float[Tensor, "b k c h w"],
        scales: Scales,
        context: Float[Tensor, "b t c h w"],
        actions: Float[Tensor, "b m a"],
        proprio: Float[Tensor, "b t p"],
        tokens: Int[Tensor, "b l"],
        level: Float[Tensor, " b"],
    ) -> Prediction:
        """Denoise ``noisy``; ``scales`` are its noise process's, ``level`` is that of the noise on ``context``."""
        raise TypeError("a video model defines forward")

    def cast(self, dtype: torch.dtype) -> VideoModel:
        """Compute in ``dtype`` from now on; the units of proprio and error stay float32."""
        for part in self.children():
            nn.Module.to(part, dtype)  # diffusers' own ``to`` warns about it
        return self

    def compile_forward(self) -> None:
        """Compile ``forward``; a call of another shape compiles again."""
        self.forward = torch.compile(self.forward)  # type: ignore[method-assign]

    def standardise(self, proprio: Float[Tensor, "b t p"]) -> Float[Tensor, "b t p"]:
        """By the statistics of the data."""
        return ((proprio - self.shift) / self.scale).clamp(-10, 10)

    def _register_units(self, proprio_mean: Sequence[float], proprio_std: Sequence[float]) -> None:
        self.register_buffer("shift", torch.tensor(list(proprio_mean), dtype=torch.float32))
        std = torch.tensor(list(proprio_std), dtype=torch.float32)
        self.register_buffer("scale", torch.where(std > 1e-6, std, torch.ones_like(std)))
        self.register_buffer("typical_error", torch.ones(()))


class ActionUNet(VideoModel):
    """``UNet2DModel`` for one frame at a time: small enough for a CPU.

    The embedding of actions, proprio, instruction and context noise goes in as ``class_labels``, so every residual
    block is scaled and shifted by it. Frames pass through a pixel-unshuffle, which quarters the cost.
    """

    @register_to_config
    def __init__(
        self,
        *,
        cameras: int = 1,
        image_size: int = 64,
        action_dim: int = 4,
        proprio_dim: int = 4,
        proprio_mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        proprio_std: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        context: int = 4,
        widths: Sequence[int] = (48, 64, 96),
        layers_per_block: int = 1,
        pixel_unshuffle: int = 2,
        norm_groups: int = 8,
        vocabulary: int = 2048,
    ) -> None:
        super().__init__()
        channels, cells = 3 * cameras, pixel_unshuffle**2
        embedding = 4 * widths[0]
        self.unet = UNet2DModel(
            sample_size=image_size // pixel_unshuffle,
            in_channels=(context + 1) * channels * cells,
            out_channels=channels * cells,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            block_out_channels=tuple(widths),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_groups,
            add_attention=False,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        )
        self.words = nn.Embedding(vocabulary, embedding, padding_idx=0)
        facts = context * (action_dim + proprio_dim) + 1
        self.condition = nn.Sequential(nn.Linear(facts, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        change = nn.Linear(embedding, proprio_dim)
        nn.init.zeros_(change.weight)  # start from "nothing moves"
        nn.init.zeros_(change.bias)
        self.proprio_head = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), change)
        self.error_head = ErrorHead(channels, embedding)
        self._register_units(proprio_mean, proprio_std)

    def embed(
        self,
        actions: Float[Tensor, "b t a"],
        proprio: Float[Tensor, "b t p"],
        tokens: Int[Tensor, "b l"],
        level: Float[Tensor, " b"],
    ) -> Float[Tensor, "b e"]:
        """Condition vector: actions, standardised proprio, mean of the words' embeddings, context-noise level."""
        facts = torch.cat([actions.flatten(1), self.standardise(proprio).flatten(1), 10 * level[:, None]], dim=1)
        words = self.words(tokens)
        count = (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        return self.condition(facts.to(words.dtype)) + words.sum(1) / count

    def forward(
        self,
        noisy: Float[Tensor, "b 1 c h w"],
        scales: Scales,
        context: Float[Tensor, "b t c h w"],
        actions: Float[Tensor, "b t a"],
        proprio: Float[Tensor, "b t p"],
        tokens: Int[Tensor, "b l"],
        level: Float[Tensor, " b"],
    ) -> Prediction:
        """Denoise the one next frame."""
        condition = self.embed(actions, proprio, tokens, level)
        skip, out, in_ = (each[:, None, None, None] for each in (scales.skip, scales.out, scales.in_))
        frame = noisy[:, 0]
        inputs = torch.cat([in_ * frame, context.flatten(1, 2)], dim=1)
        inputs = F.pixel_unshuffle(inputs, self.config["pixel_unshuffle"]).to(condition.dtype)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        output = self.unet(inputs, NOISE_EMBEDDING_SCALE * scales.noise, class_labels=condition, return_dict=False)[0]
        frame = skip * frame + out * F.pixel_shuffle(output.float(), self.config["pixel_unshuffle"])
        error = self.error_head(frame.detach(), context[:, -1], condition.detach())
        change = self.proprio_head(condition).float()
        return Prediction(frames=frame[:, None], proprio=(proprio[:, -1] + change * self.scale)[:, None],
                          error=error[:, None])


class ErrorHead(nn.Module):
    """How wrong the predicted frame will turn out, from what it changes and where. Sends no gradient to the rest."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(2 * channels, 16, 4, stride=4), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU()
        )
        logarithm = nn.Linear(64, 1)
        nn.init.constant_(logarithm.bias, -2.0)  # about the error of a copied frame
        self.judge = nn.Sequential(nn.Linear(64 + embedding, 64), nn.SiLU(), logarithm)

    def forward(
        self, frame: Float[Tensor, "b c h w"], last: Float[Tensor, "b c h w"], condition: Float[Tensor, "b e"]
    ) -> Float[Tensor, " b"]:
        """Estimate the root mean square error, in [-1, 1] pixels."""
        seen = self.look(torch.cat([frame, 4 * (frame - last)], dim=1).to(condition.dtype))
        pooled = [seen.mean((2, 3)), seen.amax((2, 3)), condition]
        return self.judge(torch.cat(pooled, dim=1)).float().squeeze(1).clamp(-8, 2).exp()

