"""The video model for GPUs: Wan's spatio-temporal transformer, one chunk of frames per chunk of actions.

Frames are latents of a KL autoencoder. Context and predicted frames go through ``WanTransformer3DModel`` as one clip
with a timestep per frame (context frames have that of the noise on them), as in diffusion forcing (Chen et al. 2024,
arXiv 2407.01392), so the blocks need no change. The action that led to a frame, and the proprio of a context frame, are
channels of that frame; the sentence is what the blocks attend to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 # diffusers looks for it here when it loads
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from jaxtyping import Float, Int
from torch import Tensor, nn

from world_model.model import Prediction, VideoModel
from world_model.process import Scales

TIMESTEPS = 1000.0
"""Range of the sinusoids that Wan's time embedding was made for."""
PATCH = 2


class ActionTransformer(VideoModel):
    """Denoises ``chunk`` latent frames at once."""

    @register_to_config
    def __init__(
        self,
        *,
        cameras: int = 1,
        image_size: int = 128,
        latent_channels: int = 4,
        action_dim: int = 4,
        proprio_dim: int = 4,
        proprio_mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        proprio_std: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        context: int = 4,
        chunk: int = 8,
        layers: int = 12,
        heads: int = 12,
        head_dim: int = 64,
        fact_channels: int = 32,
        vocabulary: int = 2048,
    ) -> None:
        super().__init__()
        width, channels = heads * head_dim, cameras * latent_channels
        self.wan = WanTransformer3DModel(
            patch_size=(1, PATCH, PATCH), num_attention_heads=heads, attention_head_dim=head_dim,
            in_channels=channels + fact_channels, out_channels=channels + fact_channels, text_dim=width, freq_dim=256,
            ffn_dim=4 * width, num_layers=layers, rope_max_seq_len=1024)
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.fact_embedding = nn.Sequential(
            nn.Linear(action_dim + proprio_dim + 1, width), nn.SiLU(), nn.Linear(width, fact_channels))
        change = nn.Linear(2 * fact_channels, proprio_dim)
        nn.init.zeros_(change.weight)  # start from "nothing moves"
        nn.init.zeros_(change.bias)
        self.proprio_head = change
        logarithm = nn.Linear(64, 1)
        nn.init.constant_(logarithm.bias, -1.0)
        self.error_head = nn.Sequential(nn.Linear(2 * fact_channels + 2 * channels, 64), nn.SiLU(), logarithm)
        self._register_units(proprio_mean, proprio_std)

    @property
    def chunk(self) -> int:
        """Frames per call."""
        return self.config["chunk"]

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
        """Denoise the next ``k`` latent frames together."""
        past, future, channels = context.shape[1], noisy.shape[1], noisy.shape[2]
        skip, out, in_ = (each[:, None, None, None, None] for each in (scales.skip, scales.out, scales.in_))
        dtype = self.words.weight.dtype
        clip = torch.cat([context, in_ * noisy], dim=1)
        facts = self._facts(actions, proprio, future).to(dtype)
        spread = facts[..., None, None].expand(*facts.shape, *clip.shape[-2:])
        hidden = torch.cat([clip.to(dtype), spread], dim=2).movedim(1, 2)
        time = torch.cat([level[:, None].expand(-1, past), (0.5 * (scales.noise + 1))[:, None].expand(-1, future)], 1)
        per_frame = clip.shape[-1] * clip.shape[-2] // PATCH**2
        output = self.wan(hidden, TIMESTEPS * time.repeat_interleave(per_frame, dim=1), self.words(tokens),
                          return_dict=False)[0].movedim(1, 2)[:, past:]
        frames = skip * noisy + out * output[:, :, :channels].float()
        features = output[:, :, channels:]
        features = torch.cat([features.mean((-1, -2)), features.amax((-1, -2))], dim=-1)
        change = self.proprio_head(features).float() * self.scale
        moved = (frames - context[:, -1:]).detach().abs()
        seen = torch.cat([features.detach(), moved.mean((-1, -2)).to(dtype), moved.amax((-1, -2)).to(dtype)], dim=-1)
        error = self.error_head(seen).float().squeeze(-1).clamp(-8, 2).exp()
        return Prediction(frames=frames, proprio=proprio[:, -1:] + change, error=error)

    def _facts(
        self, actions: Float[Tensor, "b m a"], proprio: Float[Tensor, "b t p"], future: int
    ) -> Float[Tensor, "b n f"]:
        """Of every frame: the action that led to it, its proprio where it is known, and whether it is."""
        rows, past, _ = proprio.shape
        led = torch.cat([torch.zeros_like(actions[:, :1]), actions], dim=1)
        known = torch.zeros(rows, past + future, proprio.shape[2] + 1, device=proprio.device)
        known[:, :past, :-1] = self.standardise(proprio)
        known[:, :past, -1] = 1
        return self.fact_embedding(torch.cat([led, known], dim=-1).to(self.words.weight.dtype))
