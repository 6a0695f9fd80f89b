"""The networks that a configuration names."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from data.types import Spec, Statistics, UserError
from world_model.config import WorldModelConfig
from world_model.model import ActionUNet, VideoModel
from world_model.transformer import PATCH, ActionTransformer


def check_size(config: WorldModelConfig, image_size: int) -> None:
    """Raise ``UserError`` when frames of this size do not fit the network."""
    if config.network == "unet":
        grid, what = config.pixel_unshuffle * 2 ** (len(config.widths) - 1), "pixel_unshuffle, halved once per level"
        fewer = "fewer world_model.widths"
    else:
        grid, what = PATCH * 2 ** (len(config.vae_widths) - 1), "patches of latents, halved once per autoencoder level"
        fewer = "fewer world_model.vae_widths"
    if image_size % grid:
        raise UserError(f"the world model needs image_size to be a multiple of {grid} ({what}), got {image_size}; "
                        f"choose another size or {fewer}")


def new_video_model(config: WorldModelConfig, spec: Spec, statistics: Statistics) -> VideoModel:
    """The network that ``config`` names, with weights from torch's generator."""
    shared: dict[str, Any] = {
        "cameras": len(spec.cameras), "image_size": spec.image_size, "action_dim": spec.action_dim,
        "proprio_dim": spec.proprio_dim, "proprio_mean": statistics.proprio_mean.tolist(),
        "proprio_std": statistics.proprio_std.tolist(), "context": config.context}
    if config.network == "transformer":
        return ActionTransformer(**shared, latent_channels=config.latent_channels, chunk=config.chunk,
                                 layers=config.layers, heads=config.heads, head_dim=config.head_dim)
    return ActionUNet(**shared, widths=tuple(config.widths), layers_per_block=config.layers_per_block,
                      pixel_unshuffle=config.pixel_unshuffle)


def new_autoencoder(config: WorldModelConfig, spec: Spec) -> AutoencoderKL:
    """A KL autoencoder for one camera's frames."""
    levels = len(config.vae_widths)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.vae_widths), latent_channels=config.latent_channels, norm_num_groups=8,
        sample_size=spec.image_size, scaling_factor=1.0, mid_block_add_attention=False)
