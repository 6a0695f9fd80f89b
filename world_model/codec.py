"""What a video model sees of frames: their pixels, or the latents of a KL autoencoder."""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float, UInt8
from torch import Tensor

from world_model.frames import to_bytes, to_pixels


class Codec(Protocol):
    """To a model's space and back; leading axes are kept."""

    def encode(self, frames: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b d y x"]:
        """Frames as the model sees them."""
        ...

    def decode(self, seen: Float[Tensor, "*b d y x"]) -> UInt8[Tensor, "*b c h w"]:
        """Frames that the model painted."""
        ...

    def settle(self, seen: Float[Tensor, "*b d y x"]) -> Float[Tensor, "*b d y x"]:
        """A prediction as it will be read again as context."""
        ...


class Pixels:
    """Nothing but the scale."""

    def encode(self, frames: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """To [-1, 1]."""
        return to_pixels(frames)

    def decode(self, seen: Float[Tensor, "*b c h w"]) -> UInt8[Tensor, "*b c h w"]:
        """Rounded."""
        return to_bytes(seen)

    def settle(self, seen: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b c h w"]:
        """Rounded to bytes, as recorded frames are."""
        return to_pixels(to_bytes(seen))


class Latents:
    """Means of ``AutoencoderKL``, camera by camera, scaled to about unit deviation."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae

    @torch.no_grad()
    def encode(self, frames: UInt8[Tensor, "*b c h w"]) -> Float[Tensor, "*b d y x"]:
        """Each camera by itself; their latents are stacked as the cameras were."""
        pixels = to_pixels(frames).reshape(-1, 3, *frames.shape[-2:]).to(self.vae.dtype)
        means = self.vae.encode(pixels).latent_dist.mode().float() * self.vae.config["scaling_factor"]
        return means.reshape(*frames.shape[:-3], -1, *means.shape[-2:])

    @torch.no_grad()
    def decode(self, seen: Float[Tensor, "*b d y x"]) -> UInt8[Tensor, "*b c h w"]:
        """Inverse of ``encode``, as far as the autoencoder goes."""
        latents = seen.reshape(-1, self.vae.config["latent_channels"], *seen.shape[-2:])
        latents = (latents / self.vae.config["scaling_factor"]).to(self.vae.dtype)
        pixels = self.vae.decode(latents, return_dict=False)[0].float()
        return to_bytes(pixels).reshape(*seen.shape[:-3], -1, *pixels.shape[-2:])

    def settle(self, seen: Float[Tensor, "*b d y x"]) -> Float[Tensor, "*b d y x"]:
        """As it is: context that was predicted stays latent within a rollout of training."""
        return seen


def codec_of(vae: AutoencoderKL | None) -> Codec:
    """Latents where there is an autoencoder, pixels where there is none."""
    return Pixels() if vae is None else Latents(vae)
